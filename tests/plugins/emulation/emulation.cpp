// Fibers for threads, and the few CUDA runtime calls that the kernels' host side makes.

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cuda_runtime.h"

namespace emulation {
namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr int kWarp = 32;

enum class State { kReady, kAtBlock, kAtWarp, kDone };

struct Fiber {
    ucontext_t context;  // its stack, for the first turn; setcontext makes a system call, so later turns jump
    jmp_buf jump;
    bool started;
    State state;
    uint3 index;
    uint32_t value;         // what it brought to the warp operation it is in
    const char* operation;
};

enum class Order { kForward, kReverse, kShuffled };
Order gOrder = Order::kForward;

jmp_buf gScheduler;
std::vector<Fiber> gFibers;
std::vector<std::vector<char>> gStacks;  // kept between launches
Fiber* gCurrent = nullptr;
const std::function<void()>* gBody = nullptr;

void enter() {
    (*gBody)();
    gCurrent->state = State::kDone;
    _longjmp(gScheduler, 1);
}

void wait(State state) {
    gCurrent->state = state;
    if (_setjmp(gCurrent->jump) == 0) _longjmp(gScheduler, 1);
}

// Run the current fiber until it waits or is done.
void turn() {
    if (_setjmp(gScheduler) != 0) return;
    if (gCurrent->started) _longjmp(gCurrent->jump, 1);
    gCurrent->started = true;
    setcontext(&gCurrent->context);
}

// Let those go on who have all come. Returns whether there were any; `fault` says what a GPU would not survive.
bool release(std::string& fault) {
    bool released = false;
    const size_t count = gFibers.size();
    for (size_t first = 0; first < count; first += kWarp) {
        const size_t end = std::min(first + kWarp, count);
        const auto waiting = std::count_if(gFibers.begin() + first, gFibers.begin() + end,
                                           [](const Fiber& fiber) { return fiber.state == State::kAtWarp; });
        if (waiting == 0) continue;
        if (waiting != kWarp) continue;  // the others may still come; if not, nobody is released and that is the fault
        for (size_t i = first + 1; i < end; ++i) {
            if (std::strcmp(gFibers[i].operation, gFibers[first].operation) != 0) {
                fault = std::string("lanes of a warp in different operations: ") + gFibers[first].operation + ", " +
                        gFibers[i].operation;
                return false;
            }
        }
        for (size_t i = first; i < end; ++i) gFibers[i].state = State::kReady;
        released = true;
    }
    if (released) return true;
    bool any = false;
    for (const Fiber& fiber : gFibers) {
        if (fiber.state == State::kAtWarp) {
            fault = std::string("a warp operation (") + fiber.operation + ") that not all lanes reach";
            return false;
        }
        any = any || fiber.state == State::kAtBlock;
    }
    for (Fiber& fiber : gFibers) {
        if (fiber.state == State::kAtBlock) fiber.state = State::kReady;
    }
    return any;
}

bool runBlock(dim3 block, std::mt19937& random) {
    const size_t count = size_t{block.x} * block.y * block.z;
    gFibers.resize(count);
    while (gStacks.size() < count) gStacks.emplace_back(kStackBytes);
    for (size_t i = 0; i < count; ++i) {
        Fiber& fiber = gFibers[i];
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = gStacks[i].data();
        fiber.context.uc_stack.ss_size = kStackBytes;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, enter, 0);
        fiber.started = false;
        fiber.state = State::kReady;
        fiber.index = {static_cast<unsigned>(i % block.x), static_cast<unsigned>(i / block.x % block.y),
                       static_cast<unsigned>(i / block.x / block.y)};
    }
    std::vector<size_t> order(count);
    std::iota(order.begin(), order.end(), 0);
    if (gOrder == Order::kReverse) std::reverse(order.begin(), order.end());
    for (;;) {
        if (gOrder == Order::kShuffled) std::shuffle(order.begin(), order.end(), random);
        for (const size_t i : order) {
            if (gFibers[i].state != State::kReady) continue;
            gCurrent = &gFibers[i];
            threadIdx = gCurrent->index;
            turn();
        }
        std::string fault;
        if (release(fault)) continue;
        if (fault.empty()) return true;  // all are done
        std::fprintf(stderr, "emulation: block (%u, %u): %s\n", blockIdx.x, blockIdx.y, fault.c_str());
        return false;
    }
}

}  // namespace

void blockBarrier() { wait(State::kAtBlock); }

void exchange(uint32_t value, const char* operation, uint32_t (&all)[32]) {
    gCurrent->value = value;
    gCurrent->operation = operation;
    wait(State::kAtWarp);
    const size_t first = static_cast<size_t>(gCurrent - gFibers.data()) / kWarp * kWarp;
    for (int lane = 0; lane < kWarp; ++lane) all[lane] = gFibers[first + lane].value;
    gCurrent->operation = "the end of a warp operation";
    wait(State::kAtWarp);  // nobody brings a new value before all have read
}

cudaError_t run(dim3 grid, dim3 block, const std::function<void()>& body) {
    gridDim = grid;
    blockDim = block;
    gBody = &body;
    std::mt19937 random(1);
    for (unsigned y = 0; y < grid.y; ++y) {
        for (unsigned x = 0; x < grid.x; ++x) {
            blockIdx = {x, y, 0};
            if (!runBlock(block, random)) return cudaErrorLaunchFailure;
        }
    }
    return cudaSuccess;
}

}  // namespace emulation

extern "C" {

// 0: threads take turns in order, 1: from the last to the first, 2: shuffled.
void emulation_set_order(int order) { emulation::gOrder = static_cast<emulation::Order>(order); }

cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
    std::memset(at, value, bytes);
    return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorLaunchFailure ? "the emulated launch failed" : "an error of CUDA";
}
}
