// A stand-in for TensorRT and the CUDA runtime, as far as gsx uses them, for machines without a GPU.
//
// It is a library that exports their functions, so src/tensorrt runs from `openModel` on as it does for a user. It is as
// strict as the documentation allows a GPU to be: device memory cannot be accessed by the host, has bounds, and cannot be
// read before it is written; work on a stream is delayed until it is synchronized, and host memory must not change until
// then; no address is returned twice. Its engines compute the toy model of the shared vectors (plan.h) and enforce the
// rules of IExecutionContext. What it cannot show: whether TensorRT and a GPU do what their documentation says, and how
// long anything takes.
//
// This header is for tests: they make calls fail, and ask which rules were violated.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace standin {

// The machine, as the libraries report it. To be set before a model is opened.
struct Machine {
    // Number of visible GPUs.
    int devices = 1;
    // Major version of the library; 0 for that of the headers.
    int32_t major = 0;
    // Whether cudaMalloc reuses the address that was freed last with the same size; otherwise no address is used twice.
    bool reusesAddresses = false;
    // Whether engines can be recorded as CUDA graphs.
    bool records = true;
};
Machine& machine();

// The hash of all inputs of engines since the last call of this function, as in the vectors.
std::string takeCalls();

// What was done that a GPU would not allow, as messages since the last call of this function.
std::vector<std::string> takeMisuse();

// Number of objects and memory blocks of both libraries that have not been freed.
int64_t alive();

// Calls of functions that can fail, and launches of CUDA graphs, since the process began.
int64_t calls();
int64_t graphLaunches();

// Make the call with this number fail once (0: none), or every call of a function ("": none).
void failAt(int64_t call);
void failAlways(std::string const& name);
// Let the GPU die at the call with this number: it and all later ones fail, as after an illegal address. `revive` makes
// calls work again, as a new process does.
void dieAt(int64_t call);
void revive();
// How many blocks of memory contexts have computed in since the process began.
size_t scratchBlocks();
// The name of the call that `failAt` made fail; empty if it was not reached.
std::string takeFailed();

}  // namespace standin
