/* gate * rows, added to the residual stream. See native/status.h for what holds for every function. */
#ifndef GSX_GATED_SCATTER_ADD_KERNEL_H
#define GSX_GATED_SCATTER_ADD_KERNEL_H

#include "native/status.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Bytes of scratch memory for N tokens; none is needed where `out` is `residual`. */
GSX_API size_t gsx_gated_scatter_add_workspace(int64_t tokens);

/* out = residual, and out[index[i]] = residual[index[i]] + gate[i] * rows[i] for the first K places.
 *
 * residual, out [N, H]; rows [capacity, H]; gate [capacity, gate_width], gate_width 1 or H: all of `type`;
 * index [capacity] int64, on the device, distinct; count [] int64, on the device: K; null where K is `capacity`.
 * out may be residual: then only the named rows are touched. Nothing else may overlap.
 *
 * The product is rounded to `type`, then the sum: bit by bit what PyTorch's operations give. A place outside 0..N-1 is
 * passed over; with a place named twice, one of the two wins. Deterministic otherwise. Any size but H may be 0.
 */
GSX_API gsx_status gsx_gated_scatter_add(const void* residual, const void* rows, const void* gate, const int64_t* index,
                                         const int64_t* count, int64_t tokens, int64_t capacity, int64_t width,
                                         int64_t gate_width, gsx_type type, void* out, void* workspace,
                                         size_t workspace_bytes, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif
