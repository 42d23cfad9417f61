// Attention of a few rows over a cache, without those rows that the scores leave out.
//
// The queries of all tokens that read one K/V head, its rows, are cut into chunks; the columns of the cache into tiles. A
// block takes a chunk and every `splits`-th tile, so that whatever part of the cache is in use is spread over all blocks.
// Neighbouring threads cover the channels of a column, 16 bytes each, and the other threads take other columns, each
// with a softmax of its own over these: maximum, sum and weighted values, which are joined at the end, in one order. The
// last block of a chunk to arrive joins what the blocks found.
//
// The step's own columns are not read from the cache but made from its keys and values by whoever needs them, so that no
// block waits for another one; one of the blocks that make them also writes them.

#pragma once

#include "native/codes.cuh"
#include "native/launch.cuh"
#include "native/rows.cuh"

namespace gsx {

constexpr int kThreads = 128;
constexpr int kElements = 8;  // of 16 bits, in 16 bytes
constexpr int kMostSplits = 64;

// Columns that a thread has in flight, of K and as many of V; with many rows there are no registers for more.
template <int ROWS>
constexpr int kColumnsInFlight = ROWS > 4 ? 4 : 8;
// Columns of a tile.
template <int LANES, int ROWS>
constexpr int kTile = kThreads / LANES * kColumnsInFlight<ROWS>;

template <typename T>
struct Attention {
    const T *query, *key, *value, *cos, *sin;  // query null: nobody attends
    const float *score, *threshold;  // score null: all rows are kept
    const uint8_t* mask;
    const int64_t* writeAt;
    T *keys, *values;  // [sequences, kvHeads, columns, width]
    T* out;
    float* partial;     // [groups, splits, ROWS, width], groups: of sequence, K/V head and chunk
    float2* found;      // [groups, splits, ROWS]: maximum and sum
    uint32_t* arrived;  // [groups]
    int tokens, heads, kvHeads, columns, width, window;
    int rows, chunks, splits;       // rows of a K/V head: tokens times group
    int thresholdStep;              // 0: one for all tokens
    int newStride;                  // of keys and values, from token to token
    int halfOfQuery, halfOfKey;     // channels of half of RoPE; 0: none
    // A score, times log2(e): factor x product; with a cap: cap tanh(y) = cap (1 - 2 / (2^s + 1)), s = factor x product.
    float factor, cap;
};

// Eight channels of a head from `first` on, turned by RoPE if `half` is not 0.
template <typename T>
__device__ void loadTurned(const T* head, const T* cos, const T* sin, int half, int first, float (&out)[kElements]) {
    widen<T>(*reinterpret_cast<const uint4*>(head + first), out);
    if (first >= 2 * half) return;
    const bool upper = first >= half;
    const int at = upper ? first - half : first;
    float other[kElements], cosines[kElements], sines[kElements];
    widen<T>(*reinterpret_cast<const uint4*>(head + (upper ? at : at + half)), other);
    widen<T>(*reinterpret_cast<const uint4*>(cos + at), cosines);
    widen<T>(*reinterpret_cast<const uint4*>(sin + at), sines);
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
        const float turned = __fmul_rn(other[i], upper ? sines[i] : -sines[i]);
        out[i] = asFloat(rounded<T>(fmaf(out[i], cosines[i], turned)));
    }
}

// The key of a token, as it is in the cache.
template <typename T>
__device__ uint4 keyOf(const Attention<T>& of, int64_t token, int kvHead, int first) {
    float turned[kElements];
    const T* const head = of.key + token * of.newStride + int64_t{kvHead} * of.width;
    loadTurned(head, of.cos + token * of.halfOfKey, of.sin + token * of.halfOfKey, of.halfOfKey, first, turned);
    T elements[kElements];
#pragma unroll
    for (int i = 0; i < kElements; ++i) elements[i] = rounded<T>(turned[i]);
    uint4 key;
    memcpy(&key, elements, sizeof(key));
    return key;
}
template <typename T>
__device__ uint4 valueOf(const Attention<T>& of, int64_t token, int kvHead, int first) {
    return *reinterpret_cast<const uint4*>(of.value + token * of.newStride + int64_t{kvHead} * of.width + first);
}

// Rows of one K/V head that a block attends for: of each token in turn, its heads that read this one.
template <int ROWS>
struct Chunk {
    int places[ROWS];      // where a row's channels are, among those of all heads of all tokens
    int tokens[ROWS];      // among all sequences'
    unsigned keeps[ROWS];  // 1 or 0
};

// Fill in a chunk, from its row `first` on. Must be called by every thread.
template <typename T, int ROWS>
__device__ void layOut(const Attention<T>& of, int sequence, int kvHead, int first, Chunk<ROWS>& chunk) {
    const int row = static_cast<int>(threadIdx.x);
    if (row < ROWS) {
        const int group = of.heads / of.kvHeads, token = sequence * of.tokens + (first + row) / group;
        chunk.tokens[row] = token;
        chunk.places[row] = (token * of.heads + kvHead * group + (first + row) % group) * of.width;
        const bool keeps = first + row < of.rows &&
                           (of.score == nullptr || of.score[token] > of.threshold[token * of.thresholdStep]);
        chunk.keeps[row] = keeps ? 1 : 0;
    }
    __syncthreads();
}

// Which kept rows see columns, a bit for each. Args: columns: COUNT of them, `stride` apart, below `end`.
template <typename T, int ROWS, int COUNT>
__device__ void whoSees(const Attention<T>& of, const Chunk<ROWS>& chunk, unsigned kept, int64_t column, int stride,
                        int64_t end, unsigned (&seen)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) seen[i] = 0;
    unsigned left = kept;
    while (left != 0) {  // the next token of which a row is kept
        const int token = chunk.tokens[__ffs(static_cast<int>(left)) - 1];
        unsigned rows = 0;
#pragma unroll
        for (int row = 0; row < ROWS; ++row) rows |= (chunk.tokens[row] == token ? 1u : 0u) << row;
        left &= ~rows;
        const uint8_t* const mask = of.mask + int64_t{token} * of.columns;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const int64_t at = column + i * stride;
            if (at >= 0 && at < end && mask[at] != 0) seen[i] |= rows & kept;
        }
    }
}

// The sum over neighbouring lanes, in all of them.
template <int LANES>
__device__ float sumOfLanes(float value) {
#pragma unroll
    for (int distance = LANES / 2; distance > 0; distance /= 2) {
        value = __fadd_rn(value, __shfl_xor_sync(kWholeWarp, value, distance));
    }
    return value;
}

// 2^(value - top), where -inf is what nobody has seen.
__device__ inline float weightOf(float value, float top) {
    return value == -INFINITY ? 0.0f : exp2f(__fadd_rn(value, -top));
}

// What a thread knows of the rows' softmax over the columns that it has met: maxima, sums, and weighted values.
template <int ROWS>
struct Softmax {
    float tops[ROWS], totals[ROWS], sums[ROWS][kElements];
};

// Meet some columns. Args: seen: by column, a bit for each row that sees it.
template <typename T, int LANES, int ROWS, int COUNT>
__device__ void attendTo(const Attention<T>& of, const float (&queries)[ROWS][kElements], unsigned kept,
                         const uint4 (&keys)[COUNT], const uint4 (&values)[COUNT], const unsigned (&seen)[COUNT],
                         Softmax<ROWS>& softmax) {
    float weights[ROWS][COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        float key[kElements];
        widen<T>(keys[i], key);
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
            float product = 0.0f;
#pragma unroll
            for (int j = 0; j < kElements; ++j) product = fmaf(queries[row][j], key[j], product);
            weights[row][i] = product;
        }
    }
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
        if ((kept >> row & 1) == 0) continue;
        float top = softmax.tops[row];
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            float scored = __fmul_rn(sumOfLanes<LANES>(weights[row][i]), of.factor);
            if (of.cap > 0.0f) scored = fmaf(-2.0f * of.cap, __fdividef(1.0f, exp2f(scored) + 1.0f), of.cap);
            weights[row][i] = (seen[i] >> row & 1) != 0 ? scored : -INFINITY;
            top = fmaxf(top, weights[row][i]);
        }
        const float before = weightOf(softmax.tops[row], top);
        float total = __fmul_rn(softmax.totals[row], before);
#pragma unroll
        for (int j = 0; j < kElements; ++j) softmax.sums[row][j] = __fmul_rn(softmax.sums[row][j], before);
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            weights[row][i] = weightOf(weights[row][i], top);
            total = __fadd_rn(total, weights[row][i]);
        }
        softmax.totals[row] = total;
        softmax.tops[row] = top;
    }
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        float value[kElements];
        widen<T>(values[i], value);
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
            // Also so that a value that a row does not see cannot make it NaN.
            if ((seen[i] >> row & 1) == 0) continue;
#pragma unroll
            for (int j = 0; j < kElements; ++j) {
                softmax.sums[row][j] = fmaf(weights[row][i], value[j], softmax.sums[row][j]);
            }
        }
    }
}

// Join what the blocks of a group found, by split, in order. Must be called by every thread.
template <typename T, int ROWS>
__device__ void joinSplits(const Attention<T>& of, const Chunk<ROWS>& chunk, int group, unsigned kept) {
    constexpr int kInFlight = 16;
    __shared__ float2 found[ROWS * kMostSplits];
    __shared__ float weights[ROWS * kMostSplits];
    const int thread = static_cast<int>(threadIdx.x), all = ROWS * of.splits;
    const float2* const from = of.found + int64_t{group} * all;
    for (int i = thread; i < all; i += kThreads) {
        const int split = i / ROWS, row = i % ROWS;
        if (kept >> row & 1) found[row * of.splits + split] = __ldcg(from + i);
    }
    __syncthreads();
    for (int i = thread; i < all; i += kThreads) {
        const int row = i / of.splits;
        if ((kept >> row & 1) == 0) continue;
        float top = -INFINITY;
        for (int split = 0; split < of.splits; ++split) top = fmaxf(top, found[row * of.splits + split].x);
        weights[i] = weightOf(found[i].x, top);
    }
    __syncthreads();
    const int vectors = of.width / 4;  // of floats
    for (int i = thread; i < ROWS * vectors; i += kThreads) {
        const int row = i / vectors, channel = i % vectors * 4;
        if ((kept >> row & 1) == 0) continue;
        const float* const part = of.partial + (int64_t{group} * all + row) * of.width + channel;
        float total = 0.0f, sums[4] = {};
        for (int first = 0; first < of.splits; first += kInFlight) {
            float weight[kInFlight];
            float4 held[kInFlight];
#pragma unroll
            for (int j = 0; j < kInFlight; ++j) {
                const int split = first + j;
                weight[j] = split < of.splits ? weights[row * of.splits + split] : 0.0f;
                const float4* const at = reinterpret_cast<const float4*>(part + int64_t{split} * ROWS * of.width);
                held[j] = weight[j] != 0.0f ? __ldcg(at) : float4{};  // else nothing was written
            }
#pragma unroll
            for (int j = 0; j < kInFlight; ++j) {
                if (weight[j] != 0.0f) total = fmaf(weight[j], found[row * of.splits + first + j].y, total);
                sums[0] = fmaf(weight[j], held[j].x, sums[0]);
                sums[1] = fmaf(weight[j], held[j].y, sums[1]);
                sums[2] = fmaf(weight[j], held[j].z, sums[2]);
                sums[3] = fmaf(weight[j], held[j].w, sums[3]);
            }
        }
        T* const out = of.out + chunk.places[row] + channel;
#pragma unroll
        for (int j = 0; j < 4; ++j) out[j] = rounded<T>(total > 0.0f ? sums[j] / total : 0.0f);
    }
}

// LANES: threads that cover a column. ROWS: of a chunk.
template <typename T, int LANES, int ROWS>
__global__ void __launch_bounds__(kThreads, 2) attendStep(Attention<T> of) {
    constexpr int kSlots = kThreads / LANES;  // columns at a time
    constexpr int kSteps = kColumnsInFlight<ROWS>;
    constexpr int kColumns = kTile<LANES, ROWS>;
    const int thread = static_cast<int>(threadIdx.x), slot = thread / LANES;
    const int first = thread % LANES * kElements;  // channel
    const bool reads = first < of.width;
    const int split = static_cast<int>(blockIdx.x), group = static_cast<int>(blockIdx.y);
    const int chunk = group % of.chunks, pair = group / of.chunks;
    const int sequence = pair / of.kvHeads, kvHead = pair % of.kvHeads;
    const int64_t firstToken = int64_t{sequence} * of.tokens;
    const int64_t ofCache = int64_t{pair} * of.columns * of.width;
    const int64_t start = of.writeAt[sequence];

    // The step's own columns belong to the block whose turn is behind the last tile of older ones.
    const int older = static_cast<int>(start < 0 ? 0 : start < of.columns ? start : of.columns);
    const int tiles = (older + kColumns - 1) / kColumns;
    const bool ownsNew = tiles % of.splits == split;
    if (ownsNew && chunk == 0 && reads) {
        for (int token = slot; token < of.tokens; token += kSlots) {
            const int64_t column = start + token;
            if (column < 0 || column >= of.columns) continue;
            const int64_t at = ofCache + column * of.width + first;
            *reinterpret_cast<uint4*>(of.keys + at) = keyOf(of, firstToken + token, kvHead, first);
            *reinterpret_cast<uint4*>(of.values + at) = valueOf(of, firstToken + token, kvHead, first);
        }
    }

    if (of.query == nullptr) return;
    __shared__ Chunk<ROWS> rows;
    layOut(of, sequence, kvHead, chunk * ROWS, rows);
    unsigned kept = 0;
#pragma unroll
    for (int row = 0; row < ROWS; ++row) kept |= rows.keeps[row] << row;
    if (kept == 0) return;

    float queries[ROWS][kElements] = {};
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
        if ((kept >> row & 1) == 0 || !reads) continue;
        const int64_t table = int64_t{rows.tokens[row]} * of.halfOfQuery;
        loadTurned(of.query + rows.places[row], of.cos + table, of.sin + table, of.halfOfQuery, first, queries[row]);
    }
    Softmax<ROWS> softmax{};
#pragma unroll
    for (int row = 0; row < ROWS; ++row) softmax.tops[row] = -INFINITY;

    if (ownsNew) {
        for (int place = 0; place < of.tokens; place += kSlots) {
            const int token = place + slot;
            const int64_t column = start + token;
            const int64_t end = token < of.tokens ? of.columns : 0;
            unsigned seen[1];
            whoSees(of, rows, kept, column, 0, end, seen);
            uint4 key[1] = {}, value[1] = {};
            if (seen[0] != 0 && reads) {
                key[0] = keyOf(of, firstToken + token, kvHead, first);
                value[0] = valueOf(of, firstToken + token, kvHead, first);
            }
            attendTo<T, LANES, ROWS>(of, queries, kept, key, value, seen, softmax);
        }
    }
    const int64_t lowest = of.window > 0 ? start - of.window + 1 : 0;
    const int firstTile = static_cast<int>(lowest > 0 ? lowest : 0) / kColumns;
    int tile = firstTile - firstTile % of.splits + split;
    if (tile < firstTile) tile += of.splits;
    for (; tile < tiles; tile += of.splits) {
        unsigned seen[kSteps];
        const int column = tile * kColumns + slot;
        whoSees(of, rows, kept, column, kSlots, older, seen);
        uint4 keys[kSteps], values[kSteps];
        const int64_t at = ofCache + int64_t{column} * of.width + first;
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            const bool loads = seen[step] != 0 && reads;
            const int64_t place = at + step * kSlots * of.width;
            keys[step] = loads ? *reinterpret_cast<const uint4*>(of.keys + place) : uint4{};
        }
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            const bool loads = seen[step] != 0 && reads;
            const int64_t place = at + step * kSlots * of.width;
            values[step] = loads ? *reinterpret_cast<const uint4*>(of.values + place) : uint4{};
        }
        attendTo<T, LANES, ROWS>(of, queries, kept, keys, values, seen, softmax);
    }

    // Join the slots of the block.
    __shared__ float2 ofSlots[ROWS][kSlots];
    __shared__ float ofThreads[kThreads * kElements];  // by slot, then by channel
    if (first == 0) {
#pragma unroll
        for (int row = 0; row < ROWS; ++row) ofSlots[row][slot] = {softmax.tops[row], softmax.totals[row]};
    }
    __syncthreads();
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
        if ((kept >> row & 1) == 0) continue;
        float top = -INFINITY, total = 0.0f;
        for (int other = 0; other < kSlots; ++other) top = fmaxf(top, ofSlots[row][other].x);
        for (int other = 0; other < kSlots; ++other) {
            total = fmaf(weightOf(ofSlots[row][other].x, top), ofSlots[row][other].y, total);
        }
        const float own = weightOf(softmax.tops[row], top);
#pragma unroll
        for (int i = 0; i < kElements; ++i) ofThreads[thread * kElements + i] = __fmul_rn(own, softmax.sums[row][i]);
        __syncthreads();
        const int64_t part = (int64_t{group} * of.splits + split) * ROWS + row;
        if (of.splits > 1 && thread == 0) of.found[part] = {top, total};
        for (int channel = thread; channel < of.width && top != -INFINITY; channel += kThreads) {
            float sum = 0.0f;
            for (int other = 0; other < kSlots; ++other) {
                sum = __fadd_rn(sum, ofThreads[other * LANES * kElements + channel]);
            }
            if (of.splits > 1) {
                of.partial[part * of.width + channel] = sum;
            } else {
                of.out[rows.places[row] + channel] = rounded<T>(sum / total);
            }
        }
        if (of.splits == 1 && top == -INFINITY) {
            for (int channel = thread; channel < of.width; channel += kThreads) {
                of.out[rows.places[row] + channel] = rounded<T>(0.0f);
            }
        }
        __syncthreads();  // before the next row's sums
    }
    if (of.splits == 1) return;
    if (!isLastBlock(of.arrived + group)) return;
    joinSplits<T, ROWS>(of, rows, group, kept);
    if (thread == 0) atomicAdd(of.arrived + group, 0u - gridDim.x);  // for the next call
}

}  // namespace gsx
