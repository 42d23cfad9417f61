// What the emulation must notice. Each block adds up its threads' numbers and waits for its predecessor; the last one adds
// up the blocks' sums: everything that the kernels do between threads and blocks. Each mistake leaves one thing out.

#include "native/launch.cuh"

namespace {

constexpr int kBlocks = 40, kThreads = 64;

enum Mistake { kNone, kNoBarrier, kNoFence, kNoAcquire, kOwnNumber, kOneLane };

struct State {
    uint32_t next, arrived;
    uint32_t done[kBlocks];  // volatile
    uint32_t sums[kBlocks];
    uint32_t total;
};

template <int MISTAKE>
__global__ void addUp(State* state) {
    __shared__ uint32_t values[kThreads], number;
    __shared__ bool last;
    if (threadIdx.x == 0) number = MISTAKE == kOwnNumber ? blockIdx.x : atomicAdd(&state->next, 1u);
    values[kThreads - 1 - threadIdx.x] = threadIdx.x;
    if (MISTAKE != kNoBarrier) __syncthreads();
    const uint32_t value = values[threadIdx.x];
    uint32_t sum = 0;
    if (MISTAKE != kOneLane || threadIdx.x > 0) sum = __reduce_add_sync(gsx::kWholeWarp, value);
    __syncthreads();
    if (threadIdx.x % gsx::kWarp == 0) values[threadIdx.x / gsx::kWarp] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        state->sums[number] = values[0] + values[1];
        volatile uint32_t* done = state->done;
        while (number > 0 && done[number - 1] == 0) {}
        done[number] = 1;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        if (MISTAKE != kNoFence) __threadfence();
        last = atomicAdd(&state->arrived, 1u) == kBlocks - 1;
        if (MISTAKE != kNoAcquire) __threadfence();
    }
    __syncthreads();
    if (!last || threadIdx.x > 0) return;
    uint32_t total = 0;
    for (const uint32_t one : state->sums) total += one;
    state->total = total;
}

template <int MISTAKE>
gsx_status run(State* state) {
    return gsx::launch(addUp<MISTAKE>, kBlocks, kThreads, nullptr, state);
}

}  // namespace

// The status of a run with one mistake (0: with none), its text, and whether the total is right.
extern "C" gsx_status addUpWith(int mistake, bool* right) {
    State state{};
    gsx_status (*const runs[])(State*) = {run<kNone>,      run<kNoBarrier>,  run<kNoFence>,
                                          run<kNoAcquire>, run<kOwnNumber>, run<kOneLane>};
    const gsx_status status = runs[mistake](&state);
    *right = state.total == kBlocks * kThreads * (kThreads - 1) / 2;
    return status;
}
