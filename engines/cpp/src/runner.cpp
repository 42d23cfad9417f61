#include "runner.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

#include "token_axis.h"

namespace gsx {
namespace {

Counts grown(Counts lengths, Counts const& counts) {
    std::transform(lengths.begin(), lengths.end(), counts.begin(), lengths.begin(), std::plus<>());
    return lengths;
}

Cache emptyCache(int64_t batch, int64_t capacity) {
    Counts const none(static_cast<size_t>(batch));
    return {batch, capacity, none, none, {}, {}, {}};
}

// The call that appends tokens to a cache. The caller ensures that they fit.
Call callOf(Cache const& cache, Array<int64_t> ids, Counts counts, std::shared_ptr<Controls const> controls) {
    Counts const after = grown(cache.lengths, counts);
    if (*std::max_element(after.begin(), after.end()) > cache.capacity) {
        throw std::logic_error("the cache has room for only " + std::to_string(cache.capacity) + " tokens");
    }
    return {std::move(ids), std::move(counts), cache.lengths, std::move(controls)};
}

StepOutput stepOutput(Stage const& stage, Call const& call, StageOutput output) {
    auto const branches = static_cast<int64_t>(stage.skippable().size());
    int64_t const tokens = std::accumulate(call.counts.begin(), call.counts.end(), int64_t{0});
    return {std::move(output.logits), std::move(output.likely), std::move(output.kept), tokens * branches,
            std::move(output.keptByToken)};
}

// Call `copy(number, row, start, count)` for the waiting tokens of each call and row that have not been rolled back: the
// first `count` ones, which become those from `start` on of the joined call, whose counts are `counts`.
template <typename Copy>
void eachWaiting(Cache const& cache, Counts const& counts, Copy const& copy) {
    for (size_t number = 0; number < cache.waiting.size(); ++number) {
        Call const& drafted = cache.waiting[number].first;
        for (int64_t row = 0; row < cache.batch; ++row) {
            auto const at = static_cast<size_t>(row);
            int64_t const start = drafted.lengths[at] - cache.verified[at];
            int64_t const count = std::min(start + drafted.counts[at], counts[at]) - start;
            if (count > 0) copy(number, row, start, count);
        }
    }
}

// How many of the early layers' branches kept each waiting token, as in the joined call; empty if that is not known.
Array<int64_t> joinedKept(Cache const& cache, Call const& joined) {
    for (Array<int64_t> const& kept : cache.waitingKept) {
        if (kept.data.empty()) return {};
    }
    Array<int64_t> all({joined.batch(), joined.size()});
    eachWaiting(cache, joined.counts, [&](size_t number, int64_t row, int64_t start, int64_t count) {
        copyTokens(cache.waitingKept[number], row, 0, all, start, count);
    });
    return all;
}

// Waiting tokens that have not been rolled back as one call; those of each sequence are at the front of its row.
std::pair<Call, ExitState> joinedWaiting(Cache const& cache) {
    auto const& waiting = cache.waiting;
    Call call{{}, {}, cache.verified, waiting.back().first.controls};
    for (size_t row = 0; row < cache.lengths.size(); ++row) call.counts.push_back(cache.lengths[row] - cache.verified[row]);
    int64_t const size = *std::max_element(call.counts.begin(), call.counts.end());
    call.ids = Array<int64_t>({cache.batch, size});
    ExitState joined;
    for (auto const& [name, part] : waiting.front().second) {
        Shape shape = part.shape;
        shape[tokenAxis(shape)] = size;
        joined[name] = Array<float>(shape);
    }
    eachWaiting(cache, call.counts, [&](size_t number, int64_t row, int64_t start, int64_t count) {
        auto const& [drafted, state] = waiting[number];
        copyTokens(drafted.ids, row, 0, call.ids, start, count);
        for (auto& [name, part] : joined) {
            // Any axes between the batch and the tokens (K/V heads) belong to the sequence.
            int64_t const rows = TokenView::of(part.shape, tokenAxis(part.shape)).outer / cache.batch;
            for (int64_t i = row * rows; i < (row + 1) * rows; ++i) copyTokens(state.at(name), i, 0, part, start, count);
        }
    });
    return {std::move(call), std::move(joined)};
}

}  // namespace

void Cache::rollBack(Counts const& to) {
    for (size_t row = 0; row < lengths.size(); ++row) {
        lengths[row] = std::min(lengths[row], to[row]);
        verified[row] = std::min(verified[row], to[row]);
    }
}

Cache WholeRunner::newCache(int64_t batch, int64_t capacity) {
    Cache cache = emptyCache(batch, capacity);
    cache.memory.push_back(mStage->newMemory(batch, capacity));
    return cache;
}

StepOutput WholeRunner::step(Cache& cache, Array<int64_t> ids, Counts counts, std::shared_ptr<Controls const> controls,
                             Logits logits) {
    Call const call = callOf(cache, std::move(ids), std::move(counts), std::move(controls));
    StageOutput output = mStage->run(cache.memory[0], call, {}, logits);
    cache.lengths = cache.verified = grown(call.lengths, call.counts);
    return stepOutput(*mStage, call, std::move(output));
}

Cache SplitRunner::newCache(int64_t batch, int64_t capacity) {
    Cache cache = emptyCache(batch, capacity);
    cache.memory.push_back(mEarly->newMemory(batch, capacity));
    cache.memory.push_back(mLate->newMemory(batch, capacity));
    return cache;
}

StepOutput SplitRunner::step(Cache& cache, Array<int64_t> ids, Counts counts, std::shared_ptr<Controls const> controls,
                             Logits logits) {
    StepOutput early = draft(cache, std::move(ids), std::move(counts), std::move(controls), Logits::kNone);
    return joinedOutput(std::move(early), verify(cache, logits));
}

StepOutput SplitRunner::draft(Cache& cache, Array<int64_t> ids, Counts counts, std::shared_ptr<Controls const> controls,
                              Logits logits) {
    Call call = callOf(cache, std::move(ids), std::move(counts), std::move(controls));
    StageOutput output = mEarly->run(cache.memory[0], call, {}, logits);
    cache.lengths = grown(call.lengths, call.counts);
    ExitState state = std::move(output.state);
    StepOutput step = stepOutput(*mEarly, call, std::move(output));
    cache.waitingKept.push_back(step.keptByToken);
    cache.waiting.emplace_back(std::move(call), std::move(state));
    return step;
}

StepOutput SplitRunner::verify(Cache& cache, Logits logits) {
    auto const [call, state] = joinedWaiting(cache);
    Array<int64_t> const early = joinedKept(cache, call);
    cache.waiting.clear();
    cache.waitingKept.clear();
    StageOutput output = mLate->run(cache.memory[1], call, state, logits);
    cache.verified = cache.lengths;
    StepOutput step = stepOutput(*mLate, call, std::move(output));
    std::vector<int64_t>& kept = step.keptByToken.data;
    if (early.data.empty()) kept.clear();
    std::transform(kept.begin(), kept.end(), early.data.begin(), kept.begin(), std::plus<>());
    return step;
}

StepOutput joinedOutput(StepOutput early, StepOutput late) {
    addKept(late.kept, early.kept);
    late.gatedRows += early.gatedRows;
    return late;
}

}  // namespace gsx
