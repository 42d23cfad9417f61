// The CUDA runtime's functions that gsx calls, on host memory.

#include <sys/mman.h>

#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <utility>

#include "device.h"
#include "state.h"

namespace {

using standin::IllegalAccess;
using Work = std::shared_ptr<std::function<void()> const>;

}  // namespace

// The types behind CUDA's opaque handles.
struct CUstream_st : standin::Counted {
    std::deque<Work> queue;
    bool recording = false;
    bool broken = false;
    std::vector<Work> recorded;
};
struct CUgraph_st : standin::Counted {
    std::vector<Work> work;
};
struct CUgraphExec_st : standin::Counted {
    std::vector<Work> work;
};

namespace {

// Addresses come from a range without read or write access, so that the host cannot use them; the bytes are elsewhere.
class Memory {
public:
    Memory() : mBase(reserve()), mNext(mBase) {}

    bool has(void const* address) const {
        auto const at = reinterpret_cast<uintptr_t>(address);
        return at >= mBase && at < mBase + kRange;
    }

    void* allocate(size_t size) {
        uintptr_t const address = addressFor(size);
        mLive.emplace(address, std::make_unique<Block>(size));
        return reinterpret_cast<void*>(address);
    }

    bool free(void* address) {
        auto const found = mLive.find(reinterpret_cast<uintptr_t>(address));
        if (found == mLive.end()) return false;
        mFreed[found->second->bytes.size()] = found->first;
        mLive.erase(found);
        return true;
    }

    std::vector<unsigned char> read(void const* address, size_t size, std::string const& what) {
        auto const [block, start] = find(address, size, what);
        for (size_t i = start; i < start + size; ++i) {
            if (!block.written[i]) throw IllegalAccess(what + ": byte " + std::to_string(i - start) + " was never written");
        }
        auto const begin = block.bytes.begin() + static_cast<ptrdiff_t>(start);
        return {begin, begin + static_cast<ptrdiff_t>(size)};
    }

    void write(void* address, void const* data, size_t size, std::string const& what) {
        auto const [block, start] = find(address, size, what);
        auto const* from = static_cast<unsigned char const*>(data);
        std::copy(from, from + size, block.bytes.begin() + static_cast<ptrdiff_t>(start));
        std::fill_n(block.written.begin() + static_cast<ptrdiff_t>(start), size, true);
    }

private:
    struct Block : standin::Counted {
        explicit Block(size_t size) : bytes(size), written(size) {}
        std::vector<unsigned char> bytes;
        std::vector<bool> written;
    };

    static constexpr uintptr_t kRange = uintptr_t{1} << 36;
    // The alignment of cudaMalloc, which TensorRT relies on.
    static constexpr uintptr_t kAlignment = 256;

    static uintptr_t reserve() {
        void* const range = mmap(nullptr, kRange, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (range == MAP_FAILED) throw std::runtime_error("stand-in: no addresses for device memory");
        return reinterpret_cast<uintptr_t>(range);
    }

    uintptr_t addressFor(size_t size) {
        auto const freed = mFreed.find(size);
        if (standin::machine().reusesAddresses && freed != mFreed.end()) {
            uintptr_t const address = freed->second;
            mFreed.erase(freed);
            return address;
        }
        // Blocks are not adjacent: an access beyond the end of one does not hit another.
        return std::exchange(mNext, mNext + (size / kAlignment + 2) * kAlignment);
    }

    std::pair<Block&, size_t> find(void const* address, size_t size, std::string const& what) {
        auto const at = reinterpret_cast<uintptr_t>(address);
        auto after = mLive.upper_bound(at);
        if (!has(address) || after == mLive.begin()) throw IllegalAccess(what + ": is not on the device");
        auto const& [begin, block] = *--after;
        if (at - begin + size > block->bytes.size()) {
            throw IllegalAccess(what + ": " + std::to_string(size) + " bytes are not within allocated memory");
        }
        return {*block, at - begin};
    }

    uintptr_t mBase;
    uintptr_t mNext;
    std::map<uintptr_t, std::unique_ptr<Block>> mLive;
    // Size -> the address that was freed last with this size.
    std::map<size_t, uintptr_t> mFreed;
};

Memory& memory() {
    static Memory one;
    return one;
}

std::map<cudaStream_t, std::unique_ptr<CUstream_st>>& streams() {
    static std::map<cudaStream_t, std::unique_ptr<CUstream_st>> all;
    return all;
}

// Memory of the host that the device copies from and to.
struct Pinned : standin::Counted {
    explicit Pinned(size_t size) : bytes(size) {}
    std::vector<unsigned char> bytes;
};

std::map<void*, std::unique_ptr<Pinned>>& pinned() {
    static std::map<void*, std::unique_ptr<Pinned>> all;
    return all;
}

cudaError_t gLast = cudaSuccess;

// Ends a call: an error also becomes CUDA's last error.
cudaError_t ended(cudaError_t code) {
    if (code != cudaSuccess && standin::isDead()) code = cudaErrorIllegalAddress;
    if (code != cudaSuccess) gLast = code;
    return code;
}

cudaError_t wrong(std::string const& text, cudaError_t code = cudaErrorInvalidValue) {
    standin::misuse(text);
    return ended(code);
}

// Run everything in a stream's queue. After a failure the rest is dropped, as after an error of the GPU.
cudaError_t finish(CUstream_st& stream) {
    while (!stream.queue.empty()) {
        Work const work = std::move(stream.queue.front());
        stream.queue.pop_front();
        try {
            (*work)();
        } catch (IllegalAccess const& error) {
            stream.queue.clear();
            return wrong(error.what(), cudaErrorIllegalAddress);
        }
    }
    return cudaSuccess;
}

// A copy from the host. The bytes must not change before the copy is made.
std::function<void()> copyToDevice(void* to, void const* from, size_t size) {
    auto const* bytes = static_cast<unsigned char const*>(from);
    return [=, before = std::vector<unsigned char>(bytes, bytes + size)] {
        if (std::memcmp(before.data(), from, size) != 0) {
            throw IllegalAccess("host memory changed before it was copied to the device");
        }
        standin::writeDevice(to, from, size, "copy to the device");
    };
}

std::function<void()> copyToHost(void* to, void const* from, size_t size) {
    return [=] {
        std::vector<unsigned char> const bytes = standin::readDevice(from, size, "copy from the device");
        std::memcpy(to, bytes.data(), size);
    };
}

}  // namespace

namespace standin {

bool onDevice(void const* address) { return memory().has(address); }

std::vector<unsigned char> readDevice(void const* address, size_t size, std::string const& what) {
    return memory().read(address, size, what);
}

void writeDevice(void* address, void const* data, size_t size, std::string const& what) {
    memory().write(address, data, size, what);
}

void enqueue(cudaStream_t stream, std::function<void()> work) {
    auto one = std::make_shared<std::function<void()> const>(std::move(work));
    (stream->recording ? stream->recorded.emplace_back() : stream->queue.emplace_back()) = std::move(one);
}

bool isRecording(cudaStream_t stream) { return stream->recording; }
void breakRecording(cudaStream_t stream) { stream->broken = true; }
cudaError_t lastError() { return gLast; }

void revive() {
    dieAt(0);
    takeFailed();
    gLast = cudaSuccess;
}

}  // namespace standin

extern "C" {

cudaError_t cudaGetDeviceCount(int* count) {
    if (standin::fails("cudaGetDeviceCount")) return ended(cudaErrorInsufficientDriver);
    *count = standin::machine().devices;
    return ended(*count > 0 ? cudaSuccess : cudaErrorNoDevice);
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
    if (standin::fails("cudaGetDeviceProperties")) return ended(cudaErrorUnknown);
    if (device != 0) return wrong("there is one device", cudaErrorInvalidDevice);
    *properties = {};
    std::strcpy(properties->name, "Stand-in");
    properties->major = 9;
    return cudaSuccess;
}

char const* cudaGetErrorString(cudaError_t code) {
    switch (code) {
    case cudaSuccess: return "no error";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorNoDevice: return "no CUDA-capable device is detected";
    case cudaErrorInsufficientDriver: return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorIllegalAddress: return "an illegal memory access was encountered";
    case cudaErrorInvalidValue: return "invalid argument";
    default: return "unknown error";
    }
}

cudaError_t cudaGetLastError() { return std::exchange(gLast, standin::isDead() ? cudaErrorIllegalAddress : cudaSuccess); }

cudaError_t cudaMallocHost(void** address, size_t size) {
    if (standin::fails("cudaMallocHost")) return ended(cudaErrorMemoryAllocation);
    if (size == 0) return wrong("cudaMallocHost of no bytes");
    auto block = std::make_unique<Pinned>(size);
    *address = block->bytes.data();
    pinned()[*address] = std::move(block);
    return cudaSuccess;
}

// Waits for the device, like CUDA's own.
cudaError_t cudaFreeHost(void* address) {
    for (auto const& [handle, stream] : streams()) finish(*stream);
    if (address != nullptr && pinned().erase(address) == 0) return wrong("cudaFreeHost of an address that is not pinned");
    return cudaSuccess;
}

cudaError_t cudaMalloc(void** address, size_t size) {
    if (standin::fails("cudaMalloc")) return ended(cudaErrorMemoryAllocation);
    if (size == 0) return wrong("cudaMalloc of no bytes");
    for (auto const& [handle, stream] : streams()) {
        if (stream->recording) return wrong("cudaMalloc while a stream is recorded", cudaErrorStreamCaptureUnsupported);
    }
    *address = memory().allocate(size);
    return cudaSuccess;
}

// Waits for the device, like CUDA's own.
cudaError_t cudaFree(void* address) {
    for (auto const& [handle, stream] : streams()) finish(*stream);
    if (address != nullptr && !memory().free(address)) return wrong("cudaFree of an address that is not allocated");
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, void const* from, size_t size, cudaMemcpyKind kind, cudaStream_t stream) {
    if (standin::fails("cudaMemcpyAsync")) return ended(cudaErrorUnknown);
    bool const toDevice = kind == cudaMemcpyHostToDevice;
    if (!toDevice && kind != cudaMemcpyDeviceToHost) return wrong("a kind of copy that the stand-in does not support");
    if (memory().has(to) != toDevice || memory().has(from) == toDevice) return wrong("a copy in the wrong direction");
    if (size > 0) standin::enqueue(stream, toDevice ? copyToDevice(to, from, size) : copyToHost(to, from, size));
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* address, int value, size_t size, cudaStream_t stream) {
    if (standin::fails("cudaMemsetAsync")) return ended(cudaErrorUnknown);
    standin::enqueue(stream, [=] {
        std::vector<unsigned char> const bytes(size, static_cast<unsigned char>(value));
        standin::writeDevice(address, bytes.data(), size, "cudaMemsetAsync");
    });
    return cudaSuccess;
}

cudaError_t cudaStreamCreate(cudaStream_t* stream) {
    if (standin::fails("cudaStreamCreate")) return ended(cudaErrorUnknown);
    auto made = std::make_unique<CUstream_st>();
    *stream = made.get();
    streams()[*stream] = std::move(made);
    return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    finish(*stream);
    streams().erase(stream);
    return cudaSuccess;
}

// If it is made to fail, the queued work is lost, as after an error of the GPU.
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    if (standin::fails("cudaStreamSynchronize")) {
        stream->queue.clear();
        return ended(cudaErrorUnknown);
    }
    if (stream->recording) return wrong("waiting for a stream while it is recorded", cudaErrorStreamCaptureUnsupported);
    return finish(*stream);
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
    if (standin::fails("cudaStreamBeginCapture")) return ended(cudaErrorUnknown);
    stream->recording = true;
    stream->broken = false;
    stream->recorded.clear();
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
    bool const failing = standin::fails("cudaStreamEndCapture");
    *graph = nullptr;
    if (!stream->recording) return wrong("the end of a recording that did not begin", cudaErrorIllegalState);
    stream->recording = false;
    if (failing || stream->broken) return ended(cudaErrorStreamCaptureInvalidated);
    *graph = new CUgraph_st;
    (*graph)->work = std::move(stream->recorded);
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* made, cudaGraph_t graph, unsigned long long) {
    if (standin::fails("cudaGraphInstantiate")) return ended(cudaErrorMemoryAllocation);
    *made = new CUgraphExec_st;
    (*made)->work = graph->work;
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    delete graph;
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
    if (standin::fails("cudaGraphLaunch")) return ended(cudaErrorUnknown);
    if (stream->recording) return wrong("a CUDA graph is launched while its stream is recorded");
    standin::countLaunch();
    stream->queue.insert(stream->queue.end(), graph->work.begin(), graph->work.end());
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
    delete graph;
    return cudaSuccess;
}

}  // extern "C"
