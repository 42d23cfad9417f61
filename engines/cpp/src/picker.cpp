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
// How many tokens top-p sorts at first: they nearly always reach its bound.
constexpr size_t kFirstSorted = 512;
// An upper bound of the relative rounding of a few operations in float64.
constexpr double kRounding = 1e-12;

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

// Put the first `count` of some ids in order: the largest value first, and of equal ones the earlier.
void sortFirst(std::vector<int64_t>& ids, size_t count, std::vector<double> const& values) {
    std::partial_sort(ids.begin(), ids.begin() + static_cast<std::ptrdiff_t>(count), ids.end(),
                      [&](int64_t one, int64_t other) {
                          double const a = values[static_cast<size_t>(one)];
                          double const b = values[static_cast<size_t>(other)];
                          return a > b || (a == b && one < other);
                      });
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
    Candidates found;
    found.ids.resize(scaled.size());
    std::iota(found.ids.begin(), found.ids.end(), 0);
    if (sampling.topK > 0) {
        size_t const k = std::min(static_cast<size_t>(sampling.topK), scaled.size());
        sortFirst(found.ids, k, scaled);
        found.ids.resize(k);
    }
    auto const weightOf = [&](int64_t id) { return std::exp(scaled[static_cast<size_t>(id)]); };  // that of the best is 1
    auto const weigh = [&] {
        found.weights.clear();
        for (int64_t const id : found.ids) found.weights.push_back(weightOf(id));
    };
    weigh();
    if (sampling.topP < 1) {
        double const bound = sampling.topP * sumOf(found.weights.data(), found.weights.size());
        size_t kept = 0;
        // A few tokens nearly always reach the bound: sorting all takes much longer.
        for (size_t sorted = 0; kept == 0;) {
            sorted = std::min(found.ids.size(), std::max(16 * sorted, kFirstSorted));
            sortFirst(found.ids, sorted, scaled);
            double reached = 0;
            for (size_t i = 0; i < sorted && kept == 0; ++i) {
                reached += weightOf(found.ids[i]);
                if (reached >= bound || i + 1 == found.ids.size()) kept = i + 1;
            }
        }
        found.ids.resize(kept);
        weigh();
    }
    if (sampling.minP > 0) {
        Candidates likely;
        for (size_t i = 0; i < found.ids.size(); ++i) {
            if (found.weights[i] < sampling.minP) continue;
            likely.ids.push_back(found.ids[i]);
            likely.weights.push_back(found.weights[i]);
        }
        found = std::move(likely);
    }
    divide(found.weights, sumOf(found.weights.data(), found.weights.size()));
    return found;
}

bool Likeliest::hasAllOf(float logit) const {
    return ids.size() == size || *std::min_element(logits.begin(), logits.end()) < logit;
}

bool suffices(Likeliest const& likeliest, Sampling const& sampling) {
    if (!std::isfinite(likeliest.total)) return false;  // so that the message says what is wrong with the logits
    std::vector<float> order = likeliest.logits;
    std::sort(order.begin(), order.end(), std::greater<>());
    if (sampling.greedy()) return likeliest.hasAllOf(order.front());
    auto const k = static_cast<size_t>(sampling.topK);
    if (k > 0 && k < likeliest.size) return k <= order.size() && likeliest.hasAllOf(order[k - 1]);
    bool const complete = order.size() == likeliest.size;
    if (sampling.minP > 0 && sampling.topP == 1) {
        double const below = (static_cast<double>(order.back()) - static_cast<double>(order.front())) / sampling.temperature;
        return complete || std::exp(below) < sampling.minP * (1 - kRounding);
    }
    return complete;
}

Picker::Picker(Sampling const& sampling) : mSampling(sampling) {
    std::random_device source;
    mSeed = sampling.seed ? *sampling.seed : uint64_t{source()} << 32 | source();
}

int64_t Picker::pick(LogitsRow logits, size_t sequence, int64_t place) const {
    return pickOf(logits, nullptr, sequence, place);
}

int64_t Picker::pick(Likeliest const& likeliest, size_t sequence, int64_t place) const {
    return pickOf({likeliest.logits.data(), likeliest.logits.size()}, likeliest.ids.data(), sequence, place);
}

int64_t Picker::pickOf(LogitsRow logits, int64_t const* names, size_t sequence, int64_t place) const {
    auto const nameOf = [&](int64_t id) { return names == nullptr ? id : names[id]; };
    if (mSampling.greedy()) return nameOf(static_cast<int64_t>(bestOf(logits)));
    Candidates const found = candidatesOf(logits, mSampling);
    uint64_t const key = mixed(mixed(mixed(mSeed) + sequence) + static_cast<uint64_t>(place));
    int64_t winner = 0;
    double first = std::numeric_limits<double>::infinity();
    for (size_t i = 0; i < found.ids.size(); ++i) {
        double const weight = found.weights[i];
        if (weight <= 0) continue;  // underflowed, so it can never win
        double const uniform = noise(key, nameOf(found.ids[i]));
        // -log(u) is at least 1 - u, so that few tokens need the logarithm.
        if (1 - uniform > first * weight * (1 + kRounding)) continue;
        double const arrival = -std::log(uniform) / weight;
        if (arrival < first) {
            first = arrival;
            winner = nameOf(found.ids[i]);
        }
    }
    return winner;
}

double Picker::confidence(Likeliest const& likeliest) const { return mSampling.greedy() ? 1 / likeliest.total : 1; }

double Picker::confidence(LogitsRow logits) const {
    if (!mSampling.greedy()) return 1;
    float const best = logits.data[bestOf(logits)];
    float sum = 0;
    for (size_t i = 0; i < logits.size; ++i) sum += std::exp(logits.data[i] - best);
    return 1 / static_cast<double>(sum);
}

}  // namespace gsx
