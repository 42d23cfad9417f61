#include "onnxruntime/engine.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "gsx/error.h"
#include "onnxruntime/half.h"
#include "tensor_names.h"

namespace gsx {
namespace {

// More sequences than anybody runs at once.
constexpr int64_t kMostSequences = 1 << 20;

// K or V of a batch, [B, K/V heads, T, D]: what the last call returned.
struct Columns final : Buffer {
    Tensor tensor;
};

Array<int64_t> const& intsOf(Values const& feeds, char const* name) { return std::get<Array<int64_t>>(feeds.at(name)); }

// The inputs of a call that are made for it, with the memory behind them.
class Feeds {
public:
    std::map<std::string, OrtValue const*> all() const {
        std::map<std::string, OrtValue const*> named;
        for (auto const& [name, tensor] : mTensors) named[name] = tensor.get();
        return named;
    }

    void add(std::string const& name, Tensor tensor) { mTensors[name] = std::move(tensor); }

    // A value on the host, in the type that the graph takes.
    void add(std::string const& name, Value const& value, ONNXTensorElementDataType type) {
        if (auto const* whole = std::get_if<Array<int64_t>>(&value)) {
            add(name, tensorOver(const_cast<int64_t*>(whole->data.data()), whole->shape, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64));
            return;
        }
        auto const& real = std::get<Array<float>>(value);
        void* data = const_cast<float*>(real.data.data());
        if (type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16) {
            std::vector<uint16_t>& half = mHalves.emplace_back(real.data.size());
            std::transform(real.data.begin(), real.data.end(), half.begin(), halfOf);
            data = half.data();
        }
        add(name, tensorOver(data, real.shape, type));
    }

private:
    std::map<std::string, Tensor> mTensors;
    std::vector<std::vector<uint16_t>> mHalves;
};

// An output that is wanted on the host, as float32.
Array<float> floatsOf(OrtValue& tensor, ONNXTensorElementDataType type) {
    Array<float> found(shapeOf(tensor));
    void const* const data = dataOf(tensor);
    if (type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16) {
        auto const* half = static_cast<uint16_t const*>(data);
        std::transform(half, half + found.data.size(), found.data.begin(), floatOf);
    } else {
        std::memcpy(found.data.data(), data, found.data.size() * sizeof(float));
    }
    return found;
}

// Rows of [B x S] of the logits: [B, S, V] -> [B, O, V].
Array<float> someLogits(OrtValue& tensor, ONNXTensorElementDataType type, Array<int64_t> const& rows) {
    int64_t const vocabulary = shapeOf(tensor).back();
    Array<float> found({rows.shape[0], rows.shape[1], vocabulary});
    auto const width = static_cast<size_t>(vocabulary);
    void const* const data = dataOf(tensor);
    for (size_t i = 0; i < rows.data.size(); ++i) {
        size_t const from = static_cast<size_t>(rows.data[i]) * width;
        auto const target = found.data.begin() + static_cast<std::ptrdiff_t>(i * width);
        if (type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16) {
            auto const* half = static_cast<uint16_t const*>(data) + from;
            std::transform(half, half + width, target, floatOf);
        } else {
            std::copy_n(static_cast<float const*>(data) + from, width, target);
        }
    }
    return found;
}

// Move the first `to` of `from` columns of each head together, so that they are a dense array again.
void shorten(char* data, int64_t heads, int64_t from, int64_t to, size_t columnBytes) {
    for (int64_t head = 1; head < heads; ++head) {
        std::memmove(data + static_cast<size_t>(head * to) * columnBytes, data + static_cast<size_t>(head * from) * columnBytes,
                     static_cast<size_t>(to) * columnBytes);
    }
}

// The first `past` columns of K or V as a graph's input. The memory stays the buffer's.
Tensor pastOf(Columns& columns, Shape shape, int64_t past, ONNXTensorElementDataType type) {
    shape[2] = past;
    if (columns.tensor == nullptr) {
        if (past != 0) throw EngineError("K and V of a batch are missing");
        static char nothing = 0;
        return tensorOver(&nothing, shape, type);
    }
    Shape const held = shapeOf(*columns.tensor);
    auto* const data = static_cast<char*>(dataOf(*columns.tensor));
    if (held[2] != past) shorten(data, held[0] * held[1], held[2], past, static_cast<size_t>(held[3]) * bytesOf(type));
    return tensorOver(data, shape, type);
}

// Close the gap between each sequence's old columns and its new ones, which begin at column `past` of present.
void closeUp(OrtValue& present, ONNXTensorElementDataType type, int64_t past, std::vector<int64_t> const& lengths,
             std::vector<int64_t> const& counts) {
    Shape const shape = shapeOf(present);
    size_t const columnBytes = static_cast<size_t>(shape[3]) * bytesOf(type);
    auto* const data = static_cast<char*>(dataOf(present));
    for (int64_t row = 0; row < shape[0]; ++row) {
        auto const at = static_cast<size_t>(row);
        if (lengths[at] == past || counts[at] == 0) continue;
        for (int64_t head = row * shape[1]; head < (row + 1) * shape[1]; ++head) {
            char* const begin = data + static_cast<size_t>(head * shape[2]) * columnBytes;
            std::memmove(begin + static_cast<size_t>(lengths[at]) * columnBytes, begin + static_cast<size_t>(past) * columnBytes,
                         static_cast<size_t>(counts[at]) * columnBytes);
        }
    }
}

// How many tokens each sequence has in a call: the columns of the mask that are filled, less those of the past.
std::vector<int64_t> countsOf(Array<int64_t> const& mask, std::vector<int64_t> const& lengths) {
    std::vector<int64_t> counts;
    for (size_t row = 0; row < lengths.size(); ++row) {
        auto const begin = mask.data.begin() + static_cast<std::ptrdiff_t>(row) * mask.shape[1];
        counts.push_back(std::count(begin, begin + mask.shape[1], 1) - lengths[row]);
    }
    return counts;
}

// [B, past + S]: 1 for a token. Columns beyond a sequence's own are padding, among the cached ones and among the new ones.
Array<int64_t> maskOf(std::vector<int64_t> const& lengths, std::vector<int64_t> const& counts, int64_t past, int64_t size) {
    Array<int64_t> mask({static_cast<int64_t>(lengths.size()), past + size});
    for (size_t row = 0; row < lengths.size(); ++row) {
        auto const begin = mask.data.begin() + static_cast<std::ptrdiff_t>(row) * (past + size);
        std::fill_n(begin, lengths[row], 1);
        std::fill_n(begin + past, counts[row], 1);
    }
    return mask;
}

// A field of protobuf's wire format whose value is bytes.
std::string field(int number, std::string const& value) {
    constexpr int kLengthDelimited = 2;
    std::string written(1, static_cast<char>(number << 3 | kLengthDelimited));
    size_t length = value.size();
    for (; length >= 0x80; length >>= 7) written += static_cast<char>((length & 0x7F) | 0x80);
    return written + static_cast<char>(length) + value;
}

// A serialized model with further values as outputs. In protobuf, messages one behind the other are merged: lists are
// joined. (onnx.proto: ModelProto.graph = 7, GraphProto.output = 12, ValueInfoProto.name = 1.)
std::string withOutputs(std::string const& model, std::vector<std::string> const& values) {
    std::string outputs;
    for (std::string const& value : values) outputs += field(12, field(1, value));
    return values.empty() ? model : model + field(7, outputs);
}

std::vector<std::string> indexNames(Manifest const& manifest, std::string const& graph) {
    std::vector<std::string> values;
    auto const [first, last] = manifest.layersOf(graph);
    for (auto const& [layer, branch] : manifest.skippablePlaces(first, last)) {
        values.push_back(names::keptIndex(layer, nameOf(branch)));
    }
    return values;
}

}  // namespace

EngineEntry entryForOnnxRuntime(Manifest const& manifest) {
    EngineEntry entry;
    entry.backend = "onnxruntime";
    entry.capacity = manifest.decoder.maxPositions;
    Sizes const any{1, 1, entry.capacity};
    entry.profiles = {{"any", {1, 1, kMostSequences}, any, any}};
    for (auto const& [name, graph] : manifest.graphs) {
        EngineGraph& made = entry.graphs[name];
        made.inputs = graph.inputs;
        made.outputs = graph.outputs;
        made.inputs.push_back({names::kWriteAt, {std::string("batch")}});
        made.inputs.push_back({names::kLogitsAt, {std::string("batch"), std::string("logits_columns")}});
        for (auto* const tensors : {&made.inputs, &made.outputs}) {
            for (TensorInfo& tensor : *tensors) {
                if (names::isPast(tensor.name) || names::isPresent(tensor.name)) tensor.shape.at(2) = entry.capacity;
                if (tensor.name == names::kLogits) tensor.shape.at(1) = std::string("logits_columns");
            }
        }
        auto const places = static_cast<int64_t>(indexNames(manifest, name).size());
        if (places > 0) {
            made.outputs.push_back({names::kKept, {places}});
            made.outputs.push_back({names::kKeptByToken, {std::string("batch"), std::string("sequence")}});
        }
    }
    return entry;
}

OnnxRuntimeEngine::OnnxRuntimeEngine(Manifest const& manifest, std::string const& graph, std::string const& content,
                                     std::filesystem::path const& directory, SessionSettings const& settings)
    : mIndices(indexNames(manifest, graph)), mSession(withOutputs(content, mIndices), directory, settings) {}

std::shared_ptr<Buffer> OnnxRuntimeEngine::buffer(Shape const&, std::string const&) { return std::make_shared<Columns>(); }

Values OnnxRuntimeEngine::run(size_t, Values const& feeds, SharedBuffers const& bound,
                              std::map<std::string, Shape> const& results) {
    Buffers const& buffers = *bound;
    std::vector<int64_t> const& lengths = intsOf(feeds, names::kWriteAt).data;
    std::vector<int64_t> const counts = countsOf(intsOf(feeds, names::kAttentionMask), lengths);
    int64_t const past = *std::max_element(lengths.begin(), lengths.end());
    Value const mask = maskOf(lengths, counts, past, intsOf(feeds, names::kInputIds).shape[1]);
    Feeds given;
    for (auto const& [name, type] : mSession.inputs()) {
        if (names::isPast(name)) {
            BoundBuffer const& own = buffers.at(name);
            given.add(name, pastOf(static_cast<Columns&>(*own.buffer), own.shape, past, type));
        } else if (auto const value = feeds.find(name); value != feeds.end()) {
            given.add(name, name == names::kAttentionMask ? mask : value->second, type);
        }
    }
    std::vector<std::string> wanted;
    for (auto const& [name, shape] : results) {
        if (name != names::kKept && name != names::kKeptByToken) wanted.push_back(name);
    }
    size_t const onHost = wanted.size();
    for (auto const& one : buffers) {
        if (names::isPresent(one.first)) wanted.push_back(one.first);
    }
    size_t const indices = wanted.size();
    wanted.insert(wanted.end(), mIndices.begin(), mIndices.end());
    std::vector<Tensor> outputs = mSession.run(given.all(), wanted);
    Values found;
    for (size_t i = 0; i < onHost; ++i) {
        ONNXTensorElementDataType const type = mSession.outputs().at(wanted[i]);
        found[wanted[i]] = wanted[i] == names::kLogits ? someLogits(*outputs[i], type, intsOf(feeds, names::kLogitsAt))
                                                       : floatsOf(*outputs[i], type);
    }
    for (size_t i = onHost; i < indices; ++i) {
        closeUp(*outputs[i], mSession.outputs().at(wanted[i]), past, lengths, counts);
        static_cast<Columns&>(*buffers.at(wanted[i]).buffer).tensor = std::move(outputs[i]);
    }
    if (!mIndices.empty()) {
        Array<int64_t> kept({static_cast<int64_t>(mIndices.size())});
        Array<int64_t> byToken(intsOf(feeds, names::kInputIds).shape);
        for (size_t i = 0; i < mIndices.size(); ++i) {
            OrtValue& index = *outputs[indices + i];
            kept.data[i] = shapeOf(index).at(0);
            auto const* const rows = static_cast<int64_t const*>(dataOf(index));
            for (int64_t k = 0; k < kept.data[i]; ++k) ++byToken.data[static_cast<size_t>(rows[k])];
        }
        found[names::kKept] = std::move(kept);
        found[names::kKeptByToken] = std::move(byToken);
    }
    return found;
}

}  // namespace gsx
