// A stand-in for TensorRT and the CUDA runtime: what gsx asks of both, on a machine without a GPU.
//
// It is a library that exports their functions, so that src/tensorrt runs from `openModel` on as it does for a user. It
// is stricter than a GPU wherever the documentation allows a GPU to be: device memory cannot be touched by the host, has
// bounds, and is unreadable before it was written; work on a stream waits until somebody synchronises, and host memory
// must stay as it was until then; no address is given out twice. An engine of it computes the toy model of the shared
// vectors (plan.h) and keeps the rules of IExecutionContext. What it cannot tell: whether TensorRT and a GPU do what
// their documentation says, and how long anything takes.
//
// This header is for tests: they make calls fail, and ask what was done wrong.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace standin {

// The machine, as the libraries tell of it. Set before a model is opened.
struct Machine {
    // GPUs that are visible.
    int devices = 1;
    // Major version of the library; 0 for that of the headers.
    int32_t major = 0;
    // cudaMalloc gives the address of what was freed last, where it has the size; else none twice.
    bool reusesAddresses = false;
    // Engines can be recorded as CUDA graphs.
    bool records = true;
};
Machine& machine();

// The hash of all that engines were given since it was last asked for, as the vectors have it.
std::string takeCalls();

// What was done that a GPU would not forgive, in words; forgets it.
std::vector<std::string> takeMisuse();

// Objects and memory of both libraries that nobody has freed.
int64_t alive();

// Calls of functions that can fail, and launches of CUDA graphs, since the process began.
int64_t calls();
int64_t graphLaunches();

// The call of this number fails, once, and so does every one of `name`; 0 and "" for none.
void failAt(int64_t call);
void failAlways(std::string const& name);
// The name of the call that `failAt` made fail; empty: it was not reached.
std::string takeFailed();

}  // namespace standin
