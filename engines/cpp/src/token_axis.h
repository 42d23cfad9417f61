// Cutting and joining arrays along their token axis, which is the last axis but one, or by sequence; adding up counts of rows.

#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "gsx/engine.h"
#include "gsx/manifest.h"

namespace gsx {

// The shape of an array viewed as [outer, tokens, inner].
struct TokenView {
    int64_t outer;
    int64_t tokens;
    int64_t inner;

    // [B, S] has no inner axis.
    static TokenView of(Shape const& shape, size_t axis) {
        TokenView view{1, shape[axis], 1};
        for (size_t i = 0; i < axis; ++i) view.outer *= shape[i];
        for (size_t i = axis + 1; i < shape.size(); ++i) view.inner *= shape[i];
        return view;
    }
};

inline size_t tokenAxis(Shape const& shape) { return shape.size() > 2 ? shape.size() - 2 : shape.size() - 1; }

// Copy tokens [from, from + count) of one outer row to token `to` of the same row of another array.
template <typename T>
void copyTokens(Array<T> const& source, int64_t row, int64_t from, Array<T>& target, int64_t to, int64_t count) {
    TokenView const in = TokenView::of(source.shape, tokenAxis(source.shape));
    TokenView const out = TokenView::of(target.shape, tokenAxis(target.shape));
    auto const begin = source.data.begin() + (row * in.tokens + from) * in.inner;
    std::copy(begin, begin + count * in.inner, target.data.begin() + (row * out.tokens + to) * out.inner);
}

// Tokens [start, stop) of every sequence.
template <typename T>
Array<T> someTokens(Array<T> const& array, int64_t start, int64_t stop) {
    Shape shape = array.shape;
    size_t const axis = tokenAxis(shape);
    shape[axis] = stop - start;
    Array<T> some(shape);
    for (int64_t row = 0; row < TokenView::of(shape, axis).outer; ++row) copyTokens(array, row, start, some, 0, stop - start);
    return some;
}

// Arrays concatenated along their token axis.
template <typename T>
Array<T> joinedTokens(std::vector<Array<T> const*> const& arrays) {
    Shape shape = arrays.front()->shape;
    size_t const axis = tokenAxis(shape);
    shape[axis] = 0;
    for (Array<T> const* array : arrays) shape[axis] += array->shape[axis];
    Array<T> joined(shape);
    int64_t at = 0;
    for (Array<T> const* array : arrays) {
        int64_t const tokens = array->shape[axis];
        for (int64_t row = 0; row < TokenView::of(shape, axis).outer; ++row) copyTokens(*array, row, 0, joined, at, tokens);
        at += tokens;
    }
    return joined;
}

// One token of each sequence: array [B, S, V] -> [B, 1, V].
template <typename T>
Array<T> tokenOfEach(Array<T> const& array, std::vector<int64_t> const& tokens) {
    Array<T> picked(Shape{array.shape[0], 1, array.shape[2]});
    for (int64_t row = 0; row < array.shape[0]; ++row) {
        copyTokens(array, row, tokens[static_cast<size_t>(row)], picked, 0, 1);
    }
    return picked;
}

// Sequences [start, stop), which are the first axis.
template <typename T>
Array<T> someRows(Array<T> const& array, int64_t start, int64_t stop) {
    Array<T> some;
    some.shape = array.shape;
    some.shape[0] = stop - start;
    auto const size = array.shape[0] == 0 ? 0 : static_cast<int64_t>(array.data.size()) / array.shape[0];
    some.data.assign(array.data.begin() + start * size, array.data.begin() + stop * size);
    return some;
}

// Put the sequences of an array into another one from a row on; the other may have more tokens.
template <typename T>
void putRows(Array<T> const& some, Array<T>& all, int64_t row) {
    if (some.data.empty()) return;
    int64_t const inner = TokenView::of(some.shape, tokenAxis(some.shape)).outer / some.shape[0];
    int64_t const count = some.shape[0] * inner;
    for (int64_t i = 0; i < count; ++i) {
        TokenView const in = TokenView::of(some.shape, tokenAxis(some.shape));
        TokenView const out = TokenView::of(all.shape, tokenAxis(all.shape));
        auto const begin = some.data.begin() + i * in.tokens * in.inner;
        std::copy(begin, begin + in.tokens * in.inner, all.data.begin() + (row * inner + i) * out.tokens * out.inner);
    }
}

// Add counts of rows by (layer, branch). If either table is empty, the sum is empty.
inline void addKept(std::vector<std::array<int64_t, kBranches>>& sum,
                    std::vector<std::array<int64_t, kBranches>> const& other) {
    if (other.empty()) sum.clear();
    for (size_t layer = 0; layer < sum.size(); ++layer) {
        for (size_t branch = 0; branch < kBranches; ++branch) sum[layer][branch] += other[layer][branch];
    }
}

}  // namespace gsx
