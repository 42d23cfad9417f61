// The TensorRT side, shared by all ops. An op describes its tensors and launches its kernels; everything else that TensorRT
// asks of a plugin follows from that: types, shapes, formats, checks with their messages, creation.
//
// Nothing throws or ends the process: errors are logged through TensorRT's logger, and the call fails.

#pragma once

#include <NvInferRuntime.h>

#include "native/status.h"

namespace gsx {

constexpr char const* kNamespace = "gsx";
constexpr char const* kVersion = "1";

enum class Element {
    kRow,    // float32, float16 or bfloat16, as the op's first input
    kScore,  // float32
    kPlace,  // int64
    kCodes,  // int32: four codes of 8 bits, the first in the lowest byte (TensorRT takes 8-bit constants only before DQ)
    kFlag,   // bool
};

// One tensor of an op. `shape` has a letter for each dimension. The same letter means the same size in all tensors of a
// call; `1` means one; G (a gate's width) is one or H. A letter that occurs in no input is the number of rows that the op
// keeps: it depends on the data, and is the value of the op's last output.
struct Tensor {
    char const* name;
    Element element;
    char const* shape;
    bool orNumber = false;  // a single number may take its place
};

// What TensorRT passes to an op to run it.
struct Call {
    nvinfer1::PluginTensorDesc const* shapes;  // of the inputs
    void const* const* inputs;
    void* const* outputs;
    void* workspace;
    cudaStream_t stream;
    float const* numbers;  // the node's, in the order of the op's
    uint32_t* counters;    // of an op that counts: kCounters zeros, which it leaves as zeros; null if there are none

    int64_t size(int32_t input, int32_t axis) const noexcept { return shapes[input].dims.d[axis]; }
};

// The largest inputs that an engine may get.
struct Largest {
    nvinfer1::DynamicPluginTensorDesc const* inputs;

    int64_t size(int32_t input, int32_t axis) const noexcept { return inputs[input].max.d[axis]; }
};

constexpr int32_t kMaxTensors = 14;  // inputs and outputs of an op
constexpr int32_t kMaxNumbers = 5;
constexpr int32_t kCounters = 4096;

struct Op {
    char const* name;
    int32_t inputs, outputs;
    Tensor tensors[kMaxTensors];  // inputs, then outputs
    size_t (*workspace)(Largest const& largest);
    gsx_status (*run)(Call const& call);
    // Attributes of a node, all float32 and required; null behind the last one.
    char const* numbers[kMaxNumbers + 1] = {};
    bool counts = false;  // it wants counters
};

// Scratch memory by the number of tokens, the first size of the first input.
template <size_t (*BYTES)(int64_t)>
size_t byTokens(Largest const& largest) {
    return BYTES(largest.size(0, 0));
}

// The element type of the rows; `type` must be one that the op's checks accept.
gsx_type rowType(nvinfer1::DataType type) noexcept;

// A creator for an op that lives as long as the library.
class Creator final : public nvinfer1::IPluginCreatorV3One {
public:
    explicit Creator(Op const& op) noexcept;
    Creator(Creator&& other) noexcept : Creator(other.mOp) {}

    nvinfer1::IPluginV3* createPlugin(nvinfer1::AsciiChar const* name, nvinfer1::PluginFieldCollection const* fields,
                                      nvinfer1::TensorRTPhase phase) noexcept override;
    nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override { return &mFields; }
    nvinfer1::AsciiChar const* getPluginName() const noexcept override { return mOp.name; }
    nvinfer1::AsciiChar const* getPluginVersion() const noexcept override { return kVersion; }
    nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override { return kNamespace; }

private:
    Op const& mOp;
    nvinfer1::PluginField mNames[kMaxNumbers];
    nvinfer1::PluginFieldCollection mFields{};
};

extern Op const kTopKGather;
extern Op const kThresholdGather;
extern Op const kGatedScatterAdd;
// The products of a step, by the type of their weights, and its attention.
extern Op const kProductOps[12];
extern Op const kAttentionOps[2];

}  // namespace gsx
