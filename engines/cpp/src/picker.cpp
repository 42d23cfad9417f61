#include "picker.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <random>
#include <string>

#include "gsx/error.h"
#include "text.h"

namespace gsx {
namespace {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15;

// The output function of SplitMix64.
uint64_t scrambled(uint64_t z) {
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    return z ^ z >> 31;
}

uint64_t mixed(uint64_t value) { return scrambled(value + kGolden); }

// A uniform number in (0, 1), from the upper 53 bits.
double noise(uint64_t key, int64_t id) {
    uint64_t const z = scrambled(key + (static_cast<uint64_t>(id) + 1) * kGolden);
    return (static_cast<double>(z >> 11) + 0.5) * 0x1p-53;
}

// Pairwise summation with eight partial sums per block: the order of NumPy's reduction over contiguous numbers.
double sumOf(double const* values, size_t count) {
    constexpr size_t kLanes = 8;
    constexpr size_t kBlock = 128;
    if (count < kLanes) return std::accumulate(values, values + count, 0.0);
    if (count > kBlock) {
        size_t half = count / 2;
        half -= half % kLanes;
        return sumOf(values, half) + sumOf(values + half, count - half);
    }
    std::array<double, kLanes> lane{};
    std::copy_n(values, kLanes, lane.begin());
    size_t i = kLanes;
    for (; i + kLanes <= count; i += kLanes) {
        for (size_t j = 0; j < kLanes; ++j) lane[j] += values[i + j];
    }
    double sum = ((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7]));
    for (; i < count; ++i) sum += values[i];
    return sum;
}

void divide(std::vector<double>& values, double divisor) {
    for (double& value : values) value /= divisor;
}

// Index of the likeliest token, the first one if several are equal. Throws EngineError for logits that allow no choice.
size_t bestOf(LogitsRow logits) {
    size_t best = 0;
    bool ordered = true;
    for (size_t i = 0; i < logits.size; ++i) {
        ordered = ordered && !std::isnan(logits.data[i]);
        if (logits.data[i] > logits.data[best]) best = i;
    }
    if (!ordered || logits.size == 0 || !std::isfinite(logits.data[best])) {
        throw EngineError("no token can be chosen from the model's logits",
                          {"numbers with a finite maximum", ordered ? "an infinite maximum" : "NaN",
                           "gsx verify compares the bundle with PyTorch; the range of fp16 may be too small for this model"});
    }
    return best;
}

// The least of the k largest values.
double leastOfLargest(std::vector<double> values, size_t k) {
    auto const place = values.begin() + static_cast<std::ptrdiff_t>(k) - 1;
    std::nth_element(values.begin(), place, values.end(), std::greater<>());
    return *place;
}

}  // namespace

void check(Sampling const& sampling) {
    if (!(std::isfinite(sampling.temperature) && sampling.temperature >= 0)) {
        throw UsageError("the temperature is out of range",
                         {"a number of at least 0", exactNumber(sampling.temperature), {}});
    }
    if (sampling.topK < 0) {
        throw UsageError("top-k is out of range", {"0 (all) or more", std::to_string(sampling.topK), {}});
    }
    if (!(sampling.topP > 0 && sampling.topP <= 1)) {
        throw UsageError("top-p is out of range", {"a number above 0 and at most 1", exactNumber(sampling.topP), {}});
    }
}

Candidates candidatesOf(LogitsRow logits, Sampling const& sampling) {
    float const best = logits.data[bestOf(logits)];
    std::vector<double> scaled(logits.size);
    for (size_t i = 0; i < logits.size; ++i) {
        scaled[i] = (static_cast<double>(logits.data[i]) - static_cast<double>(best)) / sampling.temperature;
    }
    auto const k = static_cast<size_t>(sampling.topK);
    double least = -std::numeric_limits<double>::infinity();
    if (k > 0 && k < scaled.size()) least = leastOfLargest(scaled, k);
    Candidates found;
    for (size_t i = 0; i < scaled.size(); ++i) {
        if (scaled[i] >= least) found.ids.push_back(static_cast<int64_t>(i));
    }
    auto const scaledOf = [&](int64_t id) { return scaled[static_cast<size_t>(id)]; };
    if (k > 0 || sampling.topP < 1) {
        std::stable_sort(found.ids.begin(), found.ids.end(),
                         [&](int64_t one, int64_t other) { return scaledOf(one) > scaledOf(other); });
    }
    if (k > 0 && found.ids.size() > k) found.ids.resize(k);
    for (int64_t const id : found.ids) found.weights.push_back(std::exp(scaledOf(id)));  // that of the best is 0
    divide(found.weights, sumOf(found.weights.data(), found.weights.size()));
    if (sampling.topP < 1) {
        size_t count = 0;
        for (double reached = 0; count < found.weights.size() && reached < sampling.topP; ++count) {
            reached += found.weights[count];
        }
        found.ids.resize(count);
        found.weights.resize(count);
        divide(found.weights, sumOf(found.weights.data(), count));
    }
    return found;
}

Picker::Picker(Sampling const& sampling) : mSampling(sampling) {
    std::random_device source;
    mSeed = sampling.seed ? *sampling.seed : uint64_t{source()} << 32 | source();
}

int64_t Picker::pick(LogitsRow logits, size_t sequence, int64_t place) const {
    if (mSampling.greedy()) return static_cast<int64_t>(bestOf(logits));
    Candidates const found = candidatesOf(logits, mSampling);
    uint64_t const key = mixed(mixed(mixed(mSeed) + sequence) + static_cast<uint64_t>(place));
    int64_t winner = 0;
    double first = std::numeric_limits<double>::infinity();
    for (size_t i = 0; i < found.ids.size(); ++i) {
        if (found.weights[i] <= 0) continue;  // underflowed, so it can never win
        double const arrival = -std::log(noise(key, found.ids[i])) / found.weights[i];
        if (arrival < first) {
            first = arrival;
            winner = found.ids[i];
        }
    }
    return winner;
}

double Picker::confidence(LogitsRow logits) const {
    if (!mSampling.greedy()) return 1;
    float const best = logits.data[bestOf(logits)];
    float sum = 0;
    for (size_t i = 0; i < logits.size; ++i) sum += std::exp(logits.data[i] - best);
    return 1 / static_cast<double>(sum);
}

}  // namespace gsx
