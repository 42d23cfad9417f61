/* Matrix products of a decode step that read the decision on the device: a row whose token skips the branch costs neither
 * weights nor activations. native/status.h has what holds for all entry points.
 *
 * A row n is kept if its score exceeds its threshold; `thresholds` is 1, one for all rows, or N. A NaN score is not kept. Weights are as in an ONNX MatMul: [I, O], y = x W. Sums
 * are in float32 and in one order, so that results repeat bit for bit; y is rounded to the element type, as a MatMul's.
 * Nothing may alias, except that `out` of gsx_skip_linear_add may be `residual`.
 *
 * Letters: N rows, 0 to GSX_MOST_SKIP_ROWS; I width of x; O width of the result. x [N, I], score [N] and threshold
 * [thresholds] float32, weights and results of x's type.
 */
#ifndef GSX_SKIP_BRANCH_H
#define GSX_SKIP_BRANCH_H

#include "native/status.h"

#ifdef __cplusplus
extern "C" {
#endif

/* More rows are a product of matrices, for which other kernels are made. */
#define GSX_MOST_SKIP_ROWS 8

/* out [N, O] = x W in kept rows, 0 in the others. */
GSX_API gsx_status gsx_skip_linear(const void* x, const float* score, const float* threshold, const void* weight,
                                   int64_t thresholds, int64_t rows, int64_t inner, int64_t width, gsx_type type,
                                   void* out, cudaStream_t stream);

/* out [N, O] = silu(x G) * (x U) in kept rows; the others are not written. gate G and up U [I, O]. Each step is rounded:
 * both products, the sigmoid, and the two products of elements. */
GSX_API gsx_status gsx_skip_gate_up(const void* x, const float* score, const float* threshold, const void* gate,
                                    const void* up, int64_t thresholds, int64_t rows, int64_t inner, int64_t width,
                                    gsx_type type, void* out, cudaStream_t stream);

/* out [N, O] = residual + gate * (x W) in kept rows, residual in the others. residual [N, O]; gate [N, gate_width], where
 * gate_width is 1 or O. Rounded after each operation. Of rows that are not kept, x and gate are not read. */
GSX_API gsx_status gsx_skip_linear_add(const void* residual, const void* x, const void* gate, const float* score,
                                       const float* threshold, const void* weight, int64_t thresholds, int64_t rows,
                                       int64_t inner, int64_t width, int64_t gate_width, gsx_type type, void* out,
                                       cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif
