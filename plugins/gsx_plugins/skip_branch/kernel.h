/* Matrix products of a decode step that read the decision on the device: a row whose token skips the branch costs neither
 * weights nor activations. native/status.h has what holds for all entry points.
 *
 * A row n is kept if its score exceeds its threshold; `thresholds` is 1, one for all rows, or N. A NaN score is not kept.
 * Weights are as in an ONNX MatMul: [I, O], y = x W. Sums are in float32 and in one order, so that results repeat bit for
 * bit; y is rounded to the element type, as a MatMul's. Nothing may alias, except that `out` of gsx_skip_linear_add may be
 * `residual`.
 *
 * Letters: N rows, 0 to GSX_MOST_SKIP_ROWS; I width of x; O width of the result; B blocks. x [N, I], score [N] and threshold
 * [thresholds] float32, results of x's type.
 */
#ifndef GSX_SKIP_BRANCH_H
#define GSX_SKIP_BRANCH_H

#include "native/status.h"

#ifdef __cplusplus
extern "C" {
#endif

/* More rows are a product of matrices, for which other kernels are made. */
#define GSX_MOST_SKIP_ROWS 8
/* Codes are read 16 at a time: O must be a multiple of this, and the codes and scales aligned to 16 bytes. */
#define GSX_CODES_AT_A_TIME 16
/* The inputs that share a scale, of a block, must be a multiple of this, so that those that a thread reads at once share it. */
#define GSX_LEAST_BLOCK 8

typedef enum {
    GSX_ROW_WEIGHTS = 0, /* of x's type */
    GSX_INT8_WEIGHTS = 1,
    GSX_E4M3_WEIGHTS = 2, /* codes must not be NaN */
} gsx_weights;

/* A matrix W [I, O]. Codes [I, O] stand for code x scale. With one block, x W is the float32 sum of x times codes, times the
 * scale; with several, the float32 sum of x times (code x scale). Nothing is rounded to x's type before the sum is complete.
 * Codes are for rows of 16 bits.
 *
 * scales [B, O], each for I / B inputs of a column: of x's type, for gsx_gate_linear float32; null without codes. `blocks` is
 * B, which is 1 for E4M3 and in gsx_gate_linear; without codes it is not read.
 */
typedef struct {
    const void* values;
    const void* scales;
    int64_t blocks;
    gsx_weights type;
} gsx_matrix;

/* out [N, O] = x W in kept rows, 0 in the others. */
GSX_API gsx_status gsx_skip_linear(const void* x, const float* score, const float* threshold, const gsx_matrix* weight,
                                   int64_t thresholds, int64_t rows, int64_t inner, int64_t width, gsx_type type,
                                   void* out, cudaStream_t stream);

/* out [N, O] = silu(x G) * (x U) in kept rows; the others are not written. gate G and up U [I, O], with weights of one
 * type. Each step is rounded: both products, the sigmoid, and the two products of elements. */
GSX_API gsx_status gsx_skip_gate_up(const void* x, const float* score, const float* threshold, const gsx_matrix* gate,
                                    const gsx_matrix* up, int64_t thresholds, int64_t rows, int64_t inner, int64_t width,
                                    gsx_type type, void* out, cudaStream_t stream);

/* out [N, O] = residual + gate * (x W) in kept rows, residual in the others. residual [N, O]; gate [N, gate_width], where
 * gate_width is 1 or O. Rounded after each operation. Of rows that are not kept, x and gate are not read. */
GSX_API gsx_status gsx_skip_linear_add(const void* residual, const void* x, const void* gate, const float* score,
                                       const float* threshold, const gsx_matrix* weight, int64_t thresholds,
                                       int64_t rows, int64_t inner, int64_t width, int64_t gate_width, gsx_type type,
                                       void* out, cudaStream_t stream);

/* out [N, O] float32 = x W in all rows: the product of a gate, which decides and so is not rounded. */
GSX_API gsx_status gsx_gate_linear(const void* x, const gsx_matrix* weight, int64_t rows, int64_t inner, int64_t width,
                                   gsx_type type, float* out, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif
