// Texts of the status codes.

#include "native/status.h"

const char* gsx_error_string(gsx_status status) {
    switch (status) {
    case GSX_OK: return "success";
    case GSX_NULL_POINTER: return "a required pointer is null";
    case GSX_UNKNOWN_TYPE: return "the element type is not float32 (0), float16 (1) or bfloat16 (2)";
    case GSX_BAD_SIZE: return "a size is negative, or sizes do not fit each other";
    case GSX_TOO_LARGE: return "more than 2,147,479,551 tokens, or a row of more than 32 MiB";
    case GSX_MISALIGNED: return "a pointer is not aligned to its element type (scratch memory: to 16 bytes)";
    case GSX_WORKSPACE_TOO_SMALL: return "the scratch memory is smaller than the workspace function requires";
    case GSX_UNKNOWN_WEIGHTS: return "no kernel for weights of this type with rows of this type (INT8 and E4M3 are for 16 bits)";
    default: return status > 0 ? cudaGetErrorString(static_cast<cudaError_t>(status)) : "not a status of gsx";
    }
}
