#include "picker.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <random>
#include <set>
#include <string>

#include "gsx/error.h"
#include "text.h"

namespace gsx {
namespace {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15;
// The ranges of gsx_engines/sampling.py.
constexpr double kMostBias = 100;
constexpr double kMostPenalty = 2;
constexpr double kMostRepetition = 100;

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

// Refuse a number that is not between two others; a NaN is not.
void checkRange(char const* what, double value, double least, double most, char const* expected) {
    if (!(value >= least && value <= most)) throw UsageError(what, {expected, exactNumber(value), {}});
}

}  // namespace

void check(Sampling const& sampling, int64_t vocabulary) {
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
    checkRange("min-p is out of range", sampling.minP, 0, 1, "a number from 0 to 1");
    checkRange("the repetition penalty is out of range", sampling.repetitionPenalty, 1 / kMostRepetition, kMostRepetition,
               "a number from 0.01 to 100; 1 for none");
    checkRange("the frequency penalty is out of range", sampling.frequencyPenalty, -kMostPenalty, kMostPenalty,
               "a number from -2 to 2");
    checkRange("the presence penalty is out of range", sampling.presencePenalty, -kMostPenalty, kMostPenalty,
               "a number from -2 to 2");
    for (auto const& [token, bias] : sampling.logitBias) {
        std::string const what = "the bias of token " + std::to_string(token) + " is out of range";
        checkRange(what.c_str(), bias, -kMostBias, kMostBias, "a number from -100 to 100");
    }
    for (auto const& [token, bias] : sampling.logitBias) {
        if (token < 0 || token >= vocabulary) {
            throw UsageError("a bias is for a token outside the vocabulary",
                             {"0 to " + std::to_string(vocabulary - 1), std::to_string(token), {}});
        }
    }
}

std::vector<float> adjusted(LogitsRow logits, Sampling const& sampling, std::vector<int64_t> const& prompt,
                            std::vector<int64_t> const& fresh) {
    std::map<int64_t, double> changed;
    auto const valueOf = [&](int64_t id) -> double& {
        return changed.try_emplace(id, static_cast<double>(logits.data[id])).first->second;
    };
    for (auto const& [token, bias] : sampling.logitBias) valueOf(token) += bias;
    if (sampling.repetitionPenalty != 1) {
        std::set<int64_t> seen(prompt.begin(), prompt.end());
        seen.insert(fresh.begin(), fresh.end());
        for (int64_t const token : seen) {
            double& value = valueOf(token);
            value = value < 0 ? value * sampling.repetitionPenalty : value / sampling.repetitionPenalty;
        }
    }
    std::map<int64_t, int64_t> counts;
    for (int64_t const token : fresh) ++counts[token];
    for (auto const& [token, count] : counts) {
        double& value = valueOf(token);
        value -= sampling.frequencyPenalty * static_cast<double>(count);
        value -= sampling.presencePenalty;
    }
    std::vector<float> values(logits.data, logits.data + logits.size);
    for (auto const& [token, value] : changed) values[static_cast<size_t>(token)] = static_cast<float>(value);
    return values;
}

TokenLogprobs logprobsOf(LogitsRow logits, int64_t token, int64_t count) {
    auto const best = static_cast<double>(logits.data[bestOf(logits)]);
    std::vector<double> weights(logits.size);
    for (size_t i = 0; i < logits.size; ++i) weights[i] = std::exp(static_cast<double>(logits.data[i]) - best);
    double const all = std::log(sumOf(weights.data(), weights.size()));
    auto const logprob = [&](int64_t id) { return static_cast<double>(logits.data[id]) - best - all; };
    std::vector<int64_t> ids(logits.size);
    std::iota(ids.begin(), ids.end(), 0);
    auto const wanted = ids.begin() + std::min(count, static_cast<int64_t>(ids.size()));
    std::partial_sort(ids.begin(), wanted, ids.end(), [&](int64_t one, int64_t other) {
        float const a = logits.data[one];
        float const b = logits.data[other];
        return a > b || (a == b && one < other);
    });
    TokenLogprobs found{logprob(token), {}};
    for (auto id = ids.begin(); id != wanted; ++id) found.top.emplace_back(*id, logprob(*id));
    return found;
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
    if (sampling.minP > 0) {
        double const leastWeight = sampling.minP * *std::max_element(found.weights.begin(), found.weights.end());
        Candidates likely;
        for (size_t i = 0; i < found.ids.size(); ++i) {
            if (found.weights[i] < leastWeight) continue;
            likely.ids.push_back(found.ids[i]);
            likely.weights.push_back(found.weights[i]);
        }
        divide(likely.weights, sumOf(likely.weights.data(), likely.weights.size()));
        return likely;
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
