/* Adding gate * rows to the residual stream. See native/status.h for the rules that hold for every function. */
#ifndef GSX_GATED_SCATTER_ADD_KERNEL_H
#define GSX_GATED_SCATTER_ADD_KERNEL_H

#include "native/status.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Bytes of scratch memory for N tokens; not needed if `out` is `residual`. */
GSX_API size_t gsx_gated_scatter_add_workspace(int64_t tokens);

/* out = residual, and out[index[i]] = residual[index[i]] + gate[i] * rows[i] for the first K elements of index.
 *
 * residual, out [N, H]; rows [capacity, H]; gate [capacity, gate_width], gate_width 1 or H: all of `type`;
 * index [capacity] int64, on the device, distinct; count [] int64, on the device: K; null if K is `capacity`.
 * out may be residual: then only the indexed rows are changed. Nothing else may overlap.
 *
 * The product is rounded to `type`, then the sum, which gives the same bits as PyTorch's operations. An index outside
 * 0..N-1 is ignored; if an index occurs twice, one of the two wins. Otherwise deterministic. Any size except H may be 0.
 */
GSX_API gsx_status gsx_gated_scatter_add(const void* residual, const void* rows, const void* gate, const int64_t* index,
                                         const int64_t* count, int64_t tokens, int64_t capacity, int64_t width,
                                         int64_t gate_width, gsx_type type, void* out, void* workspace,
                                         size_t workspace_bytes, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif
