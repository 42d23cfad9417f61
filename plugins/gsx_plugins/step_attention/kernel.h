/* Attention of a decode step that reads the decision on the device: for a row whose token skips the branch, neither queries
 * nor the cache are read. native/status.h has what holds for all entry points.
 *
 * One call turns queries and keys by RoPE, writes the keys and values of the step's tokens into the cache, and attends. The
 * tokens of sequence b go to the columns from write_at[b] on; a column outside the cache is not written. All tokens' keys
 * and values are written, whatever is skipped.
 *
 * A row n is kept if its score exceeds its threshold; `thresholds` is 1, one for all rows, or N. A NaN score is not kept.
 * Rows that are not kept are not written. With a null score all rows are kept. Where the host knows that the whole step skips
 * the branch, there are no queries at all: then the call only writes keys and values.
 *
 * Token s of sequence b sees column t if mask[b, s, t], t < write_at[b] + S, and with a window t > write_at[b] + s - window
 * (a token that is not the first may see fewer columns by its mask). A kept row that sees nothing is 0. Scores are
 * scale x query . key; with a cap c, c tanh(score / c). A head reads the K/V head h / (heads / kv_heads).
 *
 * RoPE of a head's first `rotated` channels, in halves: with i < rotated / 2, x[i] cos[i] - x[i + rotated / 2] sin[i] and
 * x[i + rotated / 2] cos[i] + x[i] sin[i], rounded once to the element type. All else is float32: sums are in one order, so
 * that results repeat bit for bit, and are rounded once.
 *
 * Letters: B sequences, S tokens of each, N = B x S rows (0 to GSX_MOST_ATTENTION_ROWS), T columns, D width of a head.
 */
#ifndef GSX_STEP_ATTENTION_H
#define GSX_STEP_ATTENTION_H

#include "native/status.h"

#ifdef __cplusplus
extern "C" {
#endif

#define GSX_MOST_ATTENTION_ROWS 8
/* D is at most this, and a multiple of 8, since 16 bytes are read at a time; so is half of `rotated`. */
#define GSX_MOST_HEAD_WIDTH 256
#define GSX_HEAD_CHANNELS_AT_A_TIME 8
/* Counters that a call may want: see `counters`. */
#define GSX_ATTENTION_COUNTERS 4096

/* Pointers are aligned to 16 bytes, but for score, threshold, mask and write_at; `mask` has one byte for each element.
 *
 * past and present [B, kv_heads, T, D] may be the same memory, as they are meant to be; else past is copied first.
 * counters: GSX_ATTENTION_COUNTERS zeros, which a call leaves as zeros, for calls that do not overlap; null: the call
 *     clears its own in the workspace, which costs another node of a graph.
 * type: 16 bits; float32 is refused.
 */
typedef struct {
    const void* query;        /* [N, heads x D] */
    const void* key;          /* [N, kv_heads x D], before RoPE if rotate_key; rows are new_stride elements apart */
    const void* value;        /* the same, never turned */
    const void* cos;          /* [N, rotated / 2]; null if nothing is rotated */
    const void* sin;          /* the same */
    const float* score;       /* [N], or null */
    const float* threshold;   /* [thresholds] */
    const void* mask;         /* [B, S, T] */
    const int64_t* write_at;  /* [B] */
    const void* past_key;
    const void* past_value;
    void* present_key;
    void* present_value;
    void* out;                /* [N, heads x D] */
    void* workspace;          /* gsx_step_attention_workspace */
    uint32_t* counters;
    int64_t sequences, tokens, heads, kv_heads, columns, width, rotated, thresholds;
    int64_t queries;          /* N, or 0 */
    int64_t window;           /* 0: none */
    int64_t new_stride;       /* at least kv_heads x D, and a multiple of 8: both may be in one memory, side by side */
    int64_t workspace_bytes;
    float scale, softcap;     /* 0: 1 / sqrt(D); 0: none */
    int rotate_query, rotate_key;
    gsx_type type;
} gsx_attention;

/* Bytes of scratch memory for a step of these sizes. */
GSX_API size_t gsx_step_attention_workspace(int64_t sequences, int64_t tokens, int64_t heads, int64_t kv_heads,
                                            int64_t columns, int64_t width);

GSX_API gsx_status gsx_step_attention(const gsx_attention* of, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif
