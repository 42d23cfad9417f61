// The stand-in's device: its memory, and streams with queued work.

#pragma once

#include <cuda_runtime_api.h>

#include <functional>
#include <string>
#include <vector>

namespace standin {

// Whether an address is one of the device's, in use or not.
bool onDevice(void const* address);

// Copy from and to device memory. `what` names the tensor or the copy in errors.
// Throws IllegalAccess: not device memory, freed memory, beyond its end, or a read of memory that was never written.
std::vector<unsigned char> readDevice(void const* address, size_t size, std::string const& what);
void writeDevice(void* address, void const* data, size_t size, std::string const& what);

// Queue work on a stream, or record it if the stream is being recorded. The work may throw IllegalAccess.
void enqueue(cudaStream_t stream, std::function<void()> work);
bool isRecording(cudaStream_t stream);
// Invalidate a recording, as a call that cannot be recorded does.
void breakRecording(cudaStream_t stream);

// CUDA's last error, as `cudaPeekAtLastError` returns it.
cudaError_t lastError();

}  // namespace standin
