/* Positions of the scores above a threshold. See native/status.h for the rules that hold for every function. */
#ifndef GSX_THRESHOLD_GATHER_KERNEL_H
#define GSX_THRESHOLD_GATHER_KERNEL_H

#include "native/status.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Bytes of scratch memory for N tokens; 0 up to 8,192 tokens. */
GSX_API size_t gsx_threshold_select_workspace(int64_t tokens);

/* The tokens whose score exceeds their threshold, in token order.
 *
 * score [N] float32; threshold [thresholds] float32, on the device: one for all tokens, or N, one for each; index [K] int64,
 * output, with room for N; count [] int64, output: K. A score equal to its threshold is not kept, nor is a NaN score; with a
 * NaN threshold nothing is kept. Deterministic. Nothing may overlap. N may be 0; count is then 0.
 */
GSX_API gsx_status gsx_threshold_select(const float* score, const float* threshold, int64_t thresholds, int64_t tokens,
                                        int64_t* index, int64_t* count, void* workspace, size_t workspace_bytes,
                                        cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif
