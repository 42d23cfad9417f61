/* Rows of a matrix, by their places. See native/status.h for what holds for every function. */
#ifndef GSX_GATHER_ROWS_H
#define GSX_GATHER_ROWS_H

#include "native/status.h"

#ifdef __cplusplus
extern "C" {
#endif

/* rows[i] = x[index[i]] for the first K places.
 *
 * x [N, H] and rows [capacity, H] of `type`; index [capacity] int64, on the device; count [] int64, on the device: K;
 * null where K is `capacity`. K above `capacity` is taken as `capacity`; rows from K on are left as they are. A place
 * outside x gives a row of zeros. Rows are copied bit by bit. Nothing may overlap. Any size but H may be 0.
 */
GSX_API gsx_status gsx_gather_rows(const void* x, int64_t tokens, int64_t width, gsx_type type, const int64_t* index,
                                   const int64_t* count, int64_t capacity, void* rows, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif
