// SkipAttention and StepAttention for TensorRT.
//
// The outputs present_key and present_value are meant to be bound to the memory of past_key and past_value. TensorRT is not
// told so, as NVIDIA's own attention plugins do not tell it (TensorRT-Edge-LLM: its compiler would refuse the network).

#include "native/plugin.h"
#include "step_attention/kernel.h"

namespace gsx {
namespace {

enum Input { kQuery, kNew, kCos, kSin, kMask, kWriteAt, kPastKey, kPastValue, kScore, kThreshold };
enum Output { kOut, kPresentKey, kPresentValue };
enum Number { kRotateQuery, kRotateKey, kScale, kSoftcap, kWindow };
static_assert(kCounters == GSX_ATTENTION_COUNTERS, "as many as the kernel may want");

size_t workspaceOf(Largest const& largest) {
    int64_t const width = largest.size(kPastKey, 3);
    if (width < 1) return 0;
    return gsx_step_attention_workspace(largest.size(kMask, 0), largest.size(kMask, 2), largest.size(kQuery, 1) / width,
                                        largest.size(kPastKey, 1), largest.size(kPastKey, 2), width);
}

template <bool SKIPS>
gsx_status run(Call const& call) {
    gsx_attention of{};
    of.sequences = call.size(kMask, 0);
    of.tokens = call.size(kMask, 2);
    of.kv_heads = call.size(kPastKey, 1);
    of.columns = call.size(kPastKey, 2);
    of.width = call.size(kPastKey, 3);
    if (of.width < 1 || call.size(kQuery, 1) % of.width != 0) return GSX_BAD_SIZE;
    of.heads = call.size(kQuery, 1) / of.width;
    if (call.size(kNew, 0) != of.sequences * of.tokens) return GSX_BAD_SIZE;
    of.queries = call.size(kQuery, 0);
    of.new_stride = call.size(kNew, 1);
    int64_t const keys = of.kv_heads * of.width;
    if (of.new_stride != 2 * keys) return GSX_BAD_SIZE;
    of.query = call.inputs[kQuery];
    of.key = call.inputs[kNew];
    of.value = static_cast<uint16_t const*>(of.key) + keys;  // of 16 bits; other types are refused
    of.rotate_query = call.numbers[kRotateQuery] != 0.0f;
    of.rotate_key = call.numbers[kRotateKey] != 0.0f;
    if (of.rotate_query || of.rotate_key) {
        of.cos = call.inputs[kCos];
        of.sin = call.inputs[kSin];
        of.rotated = 2 * call.size(kCos, 1);
    }
    if (SKIPS) {
        of.score = static_cast<float const*>(call.inputs[kScore]);
        of.threshold = static_cast<float const*>(call.inputs[kThreshold]);
        of.thresholds = call.shapes[kThreshold].dims.nbDims == 0 ? 1 : call.size(kScore, 0);
    }
    of.mask = call.inputs[kMask];
    of.write_at = static_cast<int64_t const*>(call.inputs[kWriteAt]);
    of.past_key = call.inputs[kPastKey];
    of.past_value = call.inputs[kPastValue];
    of.present_key = call.outputs[kPresentKey];
    of.present_value = call.outputs[kPresentValue];
    of.out = call.outputs[kOut];
    of.workspace = call.workspace;
    of.workspace_bytes = static_cast<int64_t>(gsx_step_attention_workspace(of.sequences, of.tokens, of.heads, of.kv_heads,
                                                                           of.columns, of.width));
    of.counters = call.counters;
    of.window = static_cast<int64_t>(call.numbers[kWindow]);
    of.scale = call.numbers[kScale];
    of.softcap = call.numbers[kSoftcap];
    of.type = rowType(call.shapes[kQuery].type);
    return gsx_step_attention(&of, call.stream);
}

constexpr Tensor kTensors[] = {
    {"query", Element::kRow, "MQ"},  // M is N, or 0: then nobody attends
    {"new", Element::kRow, "NK"},  // keys, then values: TensorRT makes them as one product
    {"cos", Element::kRow, "NR"},
    {"sin", Element::kRow, "NR"},
    {"mask", Element::kFlag, "B1ST"},
    {"write_at", Element::kPlace, "B"},
    {"past_key", Element::kRow, "BJTD"},
    {"past_value", Element::kRow, "BJTD"},
    {"score", Element::kScore, "N"},
    {"threshold", Element::kScore, "N", true},
};
constexpr Tensor kOutputs[] = {
    {"out", Element::kRow, "MQ"},
    {"present_key", Element::kRow, "BJTD"},
    {"present_value", Element::kRow, "BJTD"},
};

template <bool SKIPS>
constexpr Op attention(char const* name) {
    Op op{name, SKIPS ? kThreshold + 1 : kPastValue + 1, 3, {}, workspaceOf, run<SKIPS>};
    for (int32_t i = 0; i < op.inputs; ++i) op.tensors[i] = kTensors[i];
    for (int32_t i = 0; i < op.outputs; ++i) op.tensors[op.inputs + i] = kOutputs[i];
    char const* const numbers[] = {"rotate_query", "rotate_key", "scale", "softcap", "window"};
    for (int32_t i = 0; i < kMaxNumbers; ++i) op.numbers[i] = numbers[i];
    op.counts = true;
    return op;
}

}  // namespace

Op const kAttentionOps[] = {attention<true>("SkipAttention"), attention<false>("StepAttention")};

}  // namespace gsx
