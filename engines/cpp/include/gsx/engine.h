// The interface between decoding and a runtime: one engine of a bundle that can be called.
//
// The library implements it for TensorRT (src/tensorrt). Another implementation lets a bundle generate on another runtime,
// or tests the decoding logic without a GPU. All arrays that cross the interface are on the host, except the K/V buffers.

#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace gsx {

using Shape = std::vector<int64_t>;

// Number of elements of an array with this shape.
size_t countOf(Shape const& shape);

// A dense array on the host in row-major order.
template <typename T>
struct Array {
    Shape shape;
    std::vector<T> data;

    Array() = default;
    Array(Shape ofShape, std::vector<T> ofData) : shape(std::move(ofShape)), data(std::move(ofData)) {}
    explicit Array(Shape ofShape) : shape(std::move(ofShape)), data(countOf(shape)) {}
};

// An input or output of an engine on the host: float32 or int64.
using Value = std::variant<Array<float>, Array<int64_t>>;
using Values = std::map<std::string, Value>;

// Memory owned by the runtime, for inputs and outputs that stay there between calls.
class Buffer {
public:
    Buffer() = default;
    Buffer(Buffer const&) = delete;
    Buffer& operator=(Buffer const&) = delete;
    virtual ~Buffer() = default;
};

// Rows of a buffer, and their shape. `Buffers` has them by the names of the inputs and outputs that use them; an output
// that continues an input (`present.*`) shares the input's buffer.
struct BoundBuffer {
    std::shared_ptr<Buffer> buffer;
    Shape shape;
    // The first row of the buffer that is used: where a call runs some of a batch's sequences.
    int64_t row = 0;
};
using Buffers = std::map<std::string, BoundBuffer>;
// Never changed once a call has used them: with the object of the call before, nothing has to be bound again.
using SharedBuffers = std::shared_ptr<Buffers const>;

// An engine of one graph. Calls come one at a time.
class Engine {
public:
    Engine() = default;
    Engine(Engine const&) = delete;
    Engine& operator=(Engine const&) = delete;
    virtual ~Engine() = default;

    // Memory for the input or output of this name, filled with zeros.
    virtual std::shared_ptr<Buffer> buffer(Shape const& shape, std::string const& name) = 0;

    // Rows of a buffer of float32, after all calls so far. Only needed where engines for steps leave their logits on the
    // device. Throws EngineError: this engine cannot.
    virtual Array<float> read(BoundBuffer const& rows, std::string const& name);

    // Whether a call may use some rows of the buffers; if not, all sequences of a batch run together.
    virtual bool runsSomeRows() const { return true; }

    // One call.
    //   profile: number of the optimization profile.
    //   feeds: inputs from the host.
    //   buffers: memory that persists between calls.
    //   results: shapes of the outputs that are wanted on the host.
    // Throws EngineError: it failed, and another call may succeed. Throws LostGpuError: none will.
    virtual Values run(size_t profile, Values const& feeds, SharedBuffers const& buffers,
                       std::map<std::string, Shape> const& results) = 0;
};

}  // namespace gsx
