/* Common to all entry points of the kernels: types, status codes, and the rules of the C interface.
 *
 * Unless stated otherwise, every function takes device pointers, launches on the given stream, allocates nothing, does not
 * synchronize, and may be captured in a CUDA graph. The caller provides scratch memory: `..._workspace` returns the size
 * for a number of tokens, which never decreases as that number grows. Calls with separate workspaces may overlap.
 *
 * A status is 0 for success, a cudaError_t if CUDA failed, or one of the negative codes below if an argument was refused
 * before anything was launched.
 *
 * Letters: N tokens (batch x sequence), H width of a row, K rows kept.
 */
#ifndef GSX_STATUS_H
#define GSX_STATUS_H

#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define GSX_API __attribute__((visibility("default")))

typedef int gsx_status;

enum {
    GSX_OK = 0,
    GSX_NULL_POINTER = -1,        /* a required pointer is null */
    GSX_UNKNOWN_TYPE = -2,        /* an element type outside gsx_type */
    GSX_BAD_SIZE = -3,            /* a negative size, or sizes that do not fit each other */
    GSX_TOO_LARGE = -4,           /* more than GSX_MAX_TOKENS tokens, or a row of more than 32 MiB */
    GSX_MISALIGNED = -5,          /* a pointer that is not aligned to its element type (scratch memory: 16 bytes) */
    GSX_WORKSPACE_TOO_SMALL = -6, /* the scratch memory is smaller than `..._workspace` requires */
    GSX_UNKNOWN_WEIGHTS = -7,     /* a type of weights that the kernel lacks for rows of this type */
};

/* Element types of rows. Scores are always float32. */
typedef enum { GSX_FLOAT32 = 0, GSX_FLOAT16 = 1, GSX_BFLOAT16 = 2 } gsx_type;

/* Counts are stored in 31 bits. */
#define GSX_MAX_TOKENS ((int64_t)0x7fffffff - 4096)

/* The meaning of a status in English; never null. The text is static. */
GSX_API const char* gsx_error_string(gsx_status status);

#ifdef __cplusplus
}
#endif

#endif
