/* Gathering rows of a matrix by index. See native/status.h for the rules that hold for every function. */
#ifndef GSX_GATHER_ROWS_H
#define GSX_GATHER_ROWS_H

#include "native/status.h"

#ifdef __cplusplus
extern "C" {
#endif

/* rows[i] = x[index[i]] for the first K elements of index.
 *
 * x [N, H] and rows [capacity, H] of `type`; index [capacity] int64, on the device; count [] int64, on the device: K;
 * null if K is `capacity`. K above `capacity` is treated as `capacity`; rows from K on are not written. An index outside x
 * gives a row of zeros. Rows are copied bit by bit. Nothing may overlap. Any size except H may be 0.
 */
GSX_API gsx_status gsx_gather_rows(const void* x, int64_t tokens, int64_t width, gsx_type type, const int64_t* index,
                                   const int64_t* count, int64_t capacity, void* rows, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif
