/* Positions of the K best scores. See native/status.h for the rules that hold for every function. */
#ifndef GSX_TOPK_GATHER_KERNEL_H
#define GSX_TOPK_GATHER_KERNEL_H

#include "native/status.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Bytes of scratch memory for N tokens; 0 up to 16,384 tokens. */
GSX_API size_t gsx_topk_select_workspace(int64_t tokens);

/* The tokens with the K best scores, in token order.
 *
 * score [N] float32; k [] int64, on the device, limited to 0..N; index [K] int64, output, with room for N; count [] int64,
 * output: K. Among equal scores the earlier token wins; -0 equals 0. NaN counts as the lowest finite score: below all
 * finite ones, above -inf. Deterministic. Nothing may overlap. N may be 0; count is then 0.
 */
GSX_API gsx_status gsx_topk_select(const float* score, const int64_t* k, int64_t tokens, int64_t* index, int64_t* count,
                                   void* workspace, size_t workspace_bytes, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif
