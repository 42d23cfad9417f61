// Fibers for threads, blocks that take turns, and the few CUDA runtime calls that the kernels' host side makes. All files
// but this one and races.cpp are compiled with -fsanitize=thread: the calls that this adds end here (`__tsan_...`).

#include <link.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "cuda_runtime.h"
#include "races.h"

namespace emulation {
namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr size_t kWarp = 32;
constexpr unsigned kMostTogether = 8;      // blocks
constexpr unsigned kAccessesPerPause = 64;  // on average, where blocks run together; of those that talk to other blocks:
constexpr unsigned kTalksPerPause = 4;
constexpr int kPatience = 1 << 18;         // reads of waiting threads while nobody does anything else
constexpr int kGarbage = 0xA5;

enum class State { kReady, kAtBlock, kAtWarp, kDone };

struct Fiber {
    ucontext_t context;  // its stack, for the first turn; setcontext makes a system call, so later turns jump
    jmp_buf jump;
    bool started;
    State state;
    uint3 index;
    uint32_t value;  // what it brought to the warp operation it is in
    const char* operation;
    Knowledge knowledge;
};

struct Block {
    uint3 index;
    uint32_t number;
    uint32_t stretch;  // barriers passed
    Clock known;
    std::vector<Fiber> fibers;
    std::unique_ptr<char[]> stacks;
    std::vector<char> shared;  // while another block has its turn
    Accesses accesses;         // to its shared memory
};

enum class Order { kForward, kReverse, kTogether };

// Addresses of this library: what the linker laid out, and its thread-local variables, which are shared memory.
struct Range {
    char* first = nullptr;
    size_t bytes = 0;
    bool has(const void* at) const { return static_cast<size_t>(static_cast<const char*>(at) - first) < bytes; }
};
Range gImage, gShared;

Order gOrder = Order::kForward;
std::mt19937 gRandom;
char gFault[256];

jmp_buf gScheduler;
const std::function<void()>* gBody = nullptr;
Block* gBlock = nullptr;
Fiber* gFiber = nullptr;  // null outside of kernels
Accesses gAccesses;       // to global memory
std::unordered_map<const void*, Clock> gGiven;  // by atomic and volatile writes, by address
int gIdle = 0;            // reads of waiting threads since anything else happened
size_t gNotStarted = 0;   // blocks

unsigned below(unsigned limit) { return static_cast<unsigned>(gRandom() % limit); }

// The launch is to end.
__attribute__((format(printf, 1, 2))) void fault(const char* format, ...) {
    const int head = std::snprintf(gFault, sizeof(gFault), "block (%u, %u), thread (%u, %u): ", blockIdx.x, blockIdx.y,
                                   threadIdx.x, threadIdx.y);
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(gFault + head, sizeof(gFault) - static_cast<size_t>(head), format, arguments);
    va_end(arguments);
}

void enter() {
    (*gBody)();
    gFiber->state = State::kDone;
    _longjmp(gScheduler, 1);
}

// Give the turn back; the thread goes on when its state is kReady again.
void wait(State state) {
    gFiber->state = state;
    if (_setjmp(gFiber->jump) == 0) _longjmp(gScheduler, 1);
}

// Run the current thread until it waits, is put off or is done.
void turn() {
    if (_setjmp(gScheduler) != 0) return;
    if (gFiber->started) _longjmp(gFiber->jump, 1);
    gFiber->started = true;
    setcontext(&gFiber->context);
}

// An access of the running thread, about to be made.
void touch(const void* at, size_t bytes, Access access, bool waiting = false) {
    const char* stack = gBlock->stacks.get() + static_cast<size_t>(gFiber - gBlock->fibers.data()) * kStackBytes;
    if (Range{const_cast<char*>(stack), kStackBytes}.has(at) || gImage.has(at)) return;
    const bool shared = gShared.has(at);
    gIdle = waiting ? gIdle + 1 : 0;
    if (gIdle > kPatience) {
        fault("waits for what nobody writes; %zu blocks have not started", gNotStarted);
        _longjmp(gScheduler, 1);
    }
    const bool talks = access == Access::kStrongRead || access == Access::kStrongWrite;
    const bool pauses = gOrder == Order::kTogether && !shared && below(talks ? kTalksPerPause : kAccessesPerPause) == 0;
    if (waiting || pauses) wait(State::kReady);
    const auto thread = static_cast<uint32_t>(gFiber - gBlock->fibers.data());
    const Actor actor{gBlock->number, thread, gBlock->stretch, gBlock->known, gFiber->knowledge};
    Accesses& accesses = shared ? gBlock->accesses : gAccesses;
    if (accesses.races(actor, at, bytes, access)) {
        const bool writes = access == Access::kWrite || access == Access::kStrongWrite;
        fault("a race in %s memory: a %s of %zu bytes", shared ? "shared" : "global", writes ? "write" : "read", bytes);
        _longjmp(gScheduler, 1);
    }
}

void plain(const void* at, size_t bytes, Access access) {
    if (gFiber != nullptr) touch(at, bytes, access);
}

void volatileRead(const void* at, size_t bytes) {
    if (gFiber == nullptr) return;
    touch(at, bytes, Access::kStrongRead, true);
    join(gFiber->knowledge.seen, gGiven[at]);
}

void volatileWrite(const void* at, size_t bytes) {
    if (gFiber == nullptr) return;
    touch(at, bytes, Access::kStrongWrite);
    gGiven[at] = gFiber->knowledge.given;
}

// Let those go on who have all come. Returns whether there is anybody to go on.
bool release(Block& block) {
    const size_t count = block.fibers.size();
    bool ready = false;
    for (size_t first = 0; first < count; first += kWarp) {
        const auto warp = block.fibers.begin() + static_cast<std::ptrdiff_t>(first);
        const auto end = warp + static_cast<std::ptrdiff_t>(std::min(kWarp, count - first));
        const auto waiting = std::count_if(warp, end, [](const Fiber& fiber) { return fiber.state == State::kAtWarp; });
        if (waiting == static_cast<std::ptrdiff_t>(kWarp)) {
            for (auto fiber = warp; fiber != end; ++fiber) {
                threadIdx = fiber->index;
                if (std::strcmp(fiber->operation, warp->operation) != 0) {
                    fault("lanes of a warp in different operations: %s, %s", warp->operation, fiber->operation);
                    return false;
                }
                fiber->state = State::kReady;
            }
        }
        ready = ready || std::any_of(warp, end, [](const Fiber& fiber) { return fiber.state == State::kReady; });
    }
    if (ready) return true;
    for (Fiber& fiber : block.fibers) {
        if (fiber.state == State::kAtWarp) {
            threadIdx = fiber.index;
            fault("a warp operation (%s) that not all lanes reach", fiber.operation);
            return false;
        }
        if (fiber.state == State::kAtBlock) {
            fiber.state = State::kReady;
            ready = true;
        }
        join(block.known, fiber.knowledge.acquired);
        fiber.knowledge.acquired.clear();
    }
    ++block.stretch;
    return ready;
}

void start(Block& block, uint32_t number) {
    const size_t count = size_t{blockDim.x} * blockDim.y * blockDim.z;
    block.index = {number % gridDim.x, number / gridDim.x, 0};
    block.number = number;
    block.stretch = 0;
    block.known.clear();
    if (block.fibers.size() < count) block.stacks.reset(new char[count * kStackBytes]);
    block.fibers.resize(count);
    for (size_t i = 0; i < count; ++i) {
        Fiber& fiber = block.fibers[i];
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = block.stacks.get() + i * kStackBytes;
        fiber.context.uc_stack.ss_size = kStackBytes;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, enter, 0);
        fiber.started = false;
        fiber.state = State::kReady;
        fiber.index = {static_cast<unsigned>(i % blockDim.x), static_cast<unsigned>(i / blockDim.x % blockDim.y),
                       static_cast<unsigned>(i / blockDim.x / blockDim.y)};
        fiber.knowledge = {};
    }
    block.shared.assign(gShared.bytes, kGarbage);
    block.accesses.forget();
}

// Give each of a block's threads a turn, or only some of them. Returns whether the block is not done.
bool turns(Block& block, std::vector<size_t>& order) {
    gBlock = &block;
    blockIdx = block.index;
    size_t some = order.size();
    if (gOrder == Order::kTogether) {
        std::shuffle(order.begin(), order.end(), gRandom);
        some = 1 + below(static_cast<unsigned>(some));
    }
    for (size_t i = 0; i < some; ++i) {
        gFiber = &block.fibers[order[i]];
        if (gFiber->state != State::kReady) continue;
        threadIdx = gFiber->index;
        turn();
        if (gFault[0] != '\0') break;
    }
    gFiber = nullptr;
    return gFault[0] == '\0' && release(block);
}

// This library's addresses.
int findRanges(dl_phdr_info* info, size_t, void*) {
    const auto* own = reinterpret_cast<const char*>(&gImage);
    Range image;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        const auto& part = info->dlpi_phdr[i];
        if (part.p_type != PT_LOAD) continue;
        auto* const first = reinterpret_cast<char*>(info->dlpi_addr + part.p_vaddr);
        if (image.first == nullptr) image.first = first;
        image.bytes = static_cast<size_t>(first + part.p_memsz - image.first);
    }
    if (!image.has(own)) return 0;
    gImage = image;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        const auto& part = info->dlpi_phdr[i];
        if (part.p_type == PT_TLS) gShared = {static_cast<char*>(info->dlpi_tls_data), part.p_memsz};
    }
    return 1;
}

}  // namespace

void exchange(uint32_t value, const char* operation, uint32_t (&all)[32]) {
    gIdle = 0;
    gFiber->value = value;
    gFiber->operation = operation;
    wait(State::kAtWarp);
    const size_t first = static_cast<size_t>(gFiber - gBlock->fibers.data()) / kWarp * kWarp;
    for (size_t lane = 0; lane < kWarp; ++lane) all[lane] = gBlock->fibers[first + lane].value;
    gFiber->operation = "the end of a warp operation";
    wait(State::kAtWarp);  // nobody brings a new value before all have read
}

cudaError_t run(dim3 grid, dim3 block, const std::function<void()>& body) {
    static thread_local char any;  // by taking its address this thread gets the library's thread-local variables
    dl_iterate_phdr(findRanges, &any);
    gridDim = grid;
    blockDim = block;
    gBody = &body;
    gFault[0] = '\0';
    gAccesses.forget();
    gGiven.clear();
    const bool together = gOrder == Order::kTogether;
    std::vector<uint32_t> waiting(size_t{grid.x} * grid.y);
    std::iota(waiting.rbegin(), waiting.rend(), 0);
    if (together) std::shuffle(waiting.begin(), waiting.end(), gRandom);
    std::vector<size_t> order(size_t{block.x} * block.y * block.z);
    if (gOrder == Order::kReverse) {
        std::iota(order.rbegin(), order.rend(), 0);
    } else {
        std::iota(order.begin(), order.end(), 0);
    }
    const size_t most = together ? 1 + below(kMostTogether) : 1;
    static std::vector<std::unique_ptr<Block>> blocks;  // kept between launches; the first `running` of them run
    size_t running = 0;
    while (!waiting.empty() || running > 0) {
        if (running < most && !waiting.empty()) {
            if (running == blocks.size()) blocks.emplace_back(new Block);
            start(*blocks[running++], waiting.back());
            waiting.pop_back();
            continue;
        }
        gNotStarted = waiting.size();
        std::unique_ptr<Block>& current = blocks[below(static_cast<unsigned>(running))];
        std::memcpy(gShared.first, current->shared.data(), gShared.bytes);
        const bool more = turns(*current, order);
        if (gFault[0] != '\0') return cudaErrorLaunchFailure;
        std::memcpy(current->shared.data(), gShared.first, gShared.bytes);
        if (!more) std::swap(current, blocks[--running]);
    }
    return cudaSuccess;
}

}  // namespace emulation

void __syncthreads() {
    emulation::gIdle = 0;
    emulation::wait(emulation::State::kAtBlock);
}

void __threadfence() {
    using namespace emulation;
    Knowledge& knowledge = gFiber->knowledge;
    join(knowledge.acquired, knowledge.seen);
    knowledge.given = gBlock->known;
    join(knowledge.given, knowledge.acquired);
    if (knowledge.given.size() <= gBlock->number) knowledge.given.resize(gBlock->number + 1);
    knowledge.given[gBlock->number] = gBlock->stretch;
}

uint32_t atomicAdd(uint32_t* at, uint32_t value) {
    using namespace emulation;
    touch(at, sizeof(*at), Access::kStrongWrite);
    if (!gShared.has(at)) {
        Clock& given = gGiven[at];
        join(gFiber->knowledge.seen, given);
        join(given, gFiber->knowledge.given);
    }
    const uint32_t old = *at;
    *at += value;
    return old;
}

extern "C" {

// 0: blocks one after the other, threads take turns in order; 1: threads from the last to the first; 2: several blocks
// together, blocks and threads in an order that is drawn. The same seed gives the same run.
void emulation_set_order(int order, unsigned seed) {
    emulation::gOrder = static_cast<emulation::Order>(order);
    emulation::gRandom.seed(seed);
}

cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
    std::memset(at, value, bytes);
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
    std::memcpy(to, from, bytes);
    return cudaSuccess;
}

// What plugins keep for a context.
cudaError_t cudaMalloc(void** at, size_t bytes) {
    *at = std::malloc(bytes);
    return *at != nullptr ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaFree(void* at) {
    std::free(at);
    return cudaSuccess;
}
cudaError_t cudaMemset(void* at, int value, size_t bytes) { return cudaMemsetAsync(at, value, bytes, nullptr); }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }

const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorLaunchFailure ? emulation::gFault : "an error of CUDA";
}

// What -fsanitize=thread calls before every access, with --param=tsan-distinguish-volatile=1.
#define GSX_ACCESSES(BYTES)                                                                                             \
    void __tsan_read##BYTES(void* at) { emulation::plain(at, BYTES, emulation::Access::kRead); }                        \
    void __tsan_write##BYTES(void* at) { emulation::plain(at, BYTES, emulation::Access::kWrite); }                      \
    void __tsan_unaligned_read##BYTES(void* at) { emulation::plain(at, BYTES, emulation::Access::kRead); }              \
    void __tsan_unaligned_write##BYTES(void* at) { emulation::plain(at, BYTES, emulation::Access::kWrite); }            \
    void __tsan_volatile_read##BYTES(void* at) { emulation::volatileRead(at, BYTES); }                                  \
    void __tsan_volatile_write##BYTES(void* at) { emulation::volatileWrite(at, BYTES); }
GSX_ACCESSES(1)
GSX_ACCESSES(2)
GSX_ACCESSES(4)
GSX_ACCESSES(8)
GSX_ACCESSES(16)
void __tsan_read_range(void* at, size_t bytes) { emulation::plain(at, bytes, emulation::Access::kRead); }
void __tsan_write_range(void* at, size_t bytes) { emulation::plain(at, bytes, emulation::Access::kWrite); }
void __tsan_vptr_read(void*) {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
