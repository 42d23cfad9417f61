// The stand-in's device: its memory, and streams whose work waits.

#pragma once

#include <cuda_runtime_api.h>

#include <functional>
#include <string>
#include <vector>

namespace standin {

// Whether an address is one of the device's, in use or not.
bool onDevice(void const* address);

// Copies out of and into device memory. `what` names the tensor or the copy in errors.
// Throws IllegalAccess: no device memory, memory that was freed, beyond its end; when reading, never written.
std::vector<unsigned char> readDevice(void const* address, size_t size, std::string const& what);
void writeDevice(void* address, void const* data, size_t size, std::string const& what);

// Queue work on a stream, or record it where the stream is recorded. Work throws IllegalAccess.
void enqueue(cudaStream_t stream, std::function<void()> work);
bool isRecording(cudaStream_t stream);
// What a call that cannot be recorded does to the recording.
void breakRecording(cudaStream_t stream);

// CUDA's last error, as `cudaPeekAtLastError` tells it.
cudaError_t lastError();

}  // namespace standin
