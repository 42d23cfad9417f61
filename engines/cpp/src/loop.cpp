#include "loop.h"

#include <algorithm>
#include <chrono>
#include <memory>
#include <set>
#include <string>
#include <utility>

#include "controls.h"
#include "draft_length.h"
#include "gsx/error.h"
#include "hold.h"
#include "picker.h"

namespace gsx {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kMostLogprobs = 20;

double secondsSince(Clock::time_point began) { return std::chrono::duration<double>(Clock::now() - began).count(); }

void checkRequest(std::vector<Tokens> const& prompts, Options const& options, Manifest const& manifest) {
    DecoderShape const& shape = manifest.decoder;
    check(options.sampling, shape.vocabSize);
    if (options.logprobs && (*options.logprobs < 0 || *options.logprobs > kMostLogprobs)) {
        throw UsageError("the number of log-probabilities is out of range",
                         {"0 to " + std::to_string(kMostLogprobs), std::to_string(*options.logprobs), {}});
    }
    std::string const most = std::to_string(shape.maxPositions);
    if (prompts.empty()) throw UsageError("no prompt was given");
    if (options.maxNewTokens < 1) {
        throw UsageError("the number of new tokens is out of range",
                         {"at least 1", std::to_string(options.maxNewTokens), {}});
    }
    if (options.draftLength && (*options.draftLength < 0 || *options.draftLength > shape.maxPositions)) {
        throw UsageError("the draft length is out of range",
                         {"0 (plain decoding) to " + most, std::to_string(*options.draftLength), {}});
    }
    for (Tokens const& prompt : prompts) {
        if (prompt.empty()) throw UsageError("the prompt is empty", {"at least one token", {}, {}});
        if (static_cast<int64_t>(prompt.size()) >= shape.maxPositions) {
            throw UsageError("the prompt is longer than the model's context",
                             {"fewer than " + most + " tokens", std::to_string(prompt.size()) + " tokens", {}});
        }
        auto const [least, largest] = std::minmax_element(prompt.begin(), prompt.end());
        if (*least < 0 || *largest >= shape.vocabSize) {
            throw UsageError("the prompt contains ids outside the vocabulary",
                             {"0 to " + std::to_string(shape.vocabSize - 1),
                              std::to_string(*least) + " to " + std::to_string(*largest), {}});
        }
    }
}

Counts promptSizes(std::vector<Tokens> const& prompts) {
    Counts sizes;
    for (Tokens const& prompt : prompts) sizes.push_back(static_cast<int64_t>(prompt.size()));
    return sizes;
}

// One sequence as it grows.
class Sequence {
public:
    Sequence(size_t row, Tokens const& prompt, int64_t maxNewTokens, Manifest const& manifest, std::optional<Hold> hold)
        : mRow(row), mPrompt(prompt), mHold(std::move(hold)) {
        int64_t const room = manifest.decoder.maxPositions - promptSize();
        mLimit = std::min(maxNewTokens, room);
        mAtLimit = maxNewTokens <= room ? FinishReason::kLength : FinishReason::kContext;
    }

    size_t row() const { return mRow; }
    int64_t limit() const { return mLimit; }
    // How many more tokens it may get.
    int64_t left() const { return mFinish ? 0 : mLimit - count(); }
    // How many tokens may be drafted now: verification adds one by itself, and reads them all with the same thresholds.
    int64_t mostDrafts() const { return (mHold ? std::min(left(), mHold->leftInBlock()) : left()) - 1; }
    // Holds its budget; unset for thresholds that stay.
    std::optional<Hold>& hold() { return mHold; }
    // Position of the next new token.
    int64_t place() const { return promptSize() + count(); }
    Tokens const& prompt() const { return mPrompt; }
    Tokens const& tokens() const { return mTokens; }
    int64_t promptSize() const { return static_cast<int64_t>(mPrompt.size()); }
    int64_t count() const { return static_cast<int64_t>(mTokens.size()); }
    int64_t newest() const { return mTokens.back(); }
    // The tokens that the model has to read to choose the next one: at first the prompt, later the newest token.
    Tokens unread() const { return mTokens.empty() ? mPrompt : Tokens{newest()}; }

    void add(int64_t token, std::set<int64_t> const& stops, OnToken const& onToken) {
        mTokens.push_back(token);
        bool const stopped = onToken && onToken(mRow, token);
        if (stops.count(token) != 0) {
            mFinish = FinishReason::kEndOfText;
        } else if (stopped) {
            mFinish = FinishReason::kStopped;
        } else if (count() == mLimit) {
            mFinish = mAtLimit;
        }
    }

    void record(TokenLogprobs logprobs) { mLogprobs.push_back(std::move(logprobs)); }

    Generated result() && {
        return {std::move(mTokens), mFinish.value_or(FinishReason::kLength), std::move(mLogprobs)};
    }

private:
    size_t mRow;
    Tokens const& mPrompt;
    std::optional<Hold> mHold;
    int64_t mLimit;
    FinishReason mAtLimit;
    Tokens mTokens;
    std::vector<TokenLogprobs> mLogprobs;
    std::optional<FinishReason> mFinish;
};

class Loop {
public:
    Loop(Runner& runner, Draft* draft, std::unique_ptr<DraftLength> length, std::vector<Tokens> const& prompts,
         Options const& options)
        : mRunner(runner),
          mDraft(draft),
          mLength(std::move(length)),
          mPicker(options.sampling),
          mControls(controlsFor(runner.manifest(), options.keep, promptSizes(prompts))),
          mLogprobs(options.logprobs),
          mOnToken(options.onToken) {
        Tokens const& stops = options.stopIds ? *options.stopIds : runner.manifest().decoder.eosIds;
        mStops.insert(stops.begin(), stops.end());
        for (size_t row = 0; row < prompts.size(); ++row) {
            mSequences.emplace_back(row, prompts[row], options.maxNewTokens, runner.manifest(), heldOf(options.keep, row));
        }
        if (mDraft != nullptr) mDraft->begin(mControls);
    }

    Generation run() {
        int64_t capacity = 0;
        for (Sequence const& sequence : mSequences) capacity = std::max(capacity, sequence.place() + sequence.limit());
        Cache cache = mRunner.newCache(static_cast<int64_t>(mSequences.size()), capacity);
        auto const started = Clock::now();
        prefill(cache);
        mStats.prefillSeconds = secondsSince(started);
        auto const prefilled = Clock::now();
        while (mostLeft() > 0) {
            int64_t const wanted = mDraft != nullptr ? mLength->next() : 0;
            // No more than some sequence can still use.
            int64_t most = 0;
            for (Sequence const& sequence : mSequences) most = std::max(most, sequence.mostDrafts());
            int64_t const size = std::min(wanted, most);
            if (size > 0) {
                speculate(cache, size);
            } else {
                plainStep(cache);
            }
            ++mStats.decodeSteps;
        }
        if (mStats.decodeSteps > 0) mStats.decodeSeconds = secondsSince(prefilled);
        return finish();
    }

private:
    // What holds the budget of a sequence; unset if its request does not ask for that.
    std::optional<Hold> heldOf(std::vector<Keep> const& keep, size_t row) const {
        if (keep.empty()) return std::nullopt;
        std::optional<Hold> hold = holdOf(mRunner.manifest(), keep.size() == 1 ? keep.front() : keep[row]);
        if (hold && !mRunner.countsTokens()) {
            throw UsageError("these engines do not tell how many branches each token kept, so no budget can be held",
                             {"engines with the output kept_by_token", "engines that an older gsx built",
                              "build them again with gsx build, or leave out the hold"});
        }
        return hold;
    }

    int64_t mostLeft() const {
        int64_t most = 0;
        for (Sequence const& sequence : mSequences) most = std::max(most, sequence.left());
        return most;
    }

    Generation finish() {
        mStats.sequences = static_cast<int64_t>(mSequences.size());
        Generation made;
        for (Sequence& sequence : mSequences) {
            mStats.promptTokens += sequence.promptSize();
            mStats.newTokens += sequence.count();
            if (auto const& hold = sequence.hold()) {
                mStats.heldKeptRows += hold->kept();
                mStats.heldGatedRows += hold->gated();
            }
            made.sequences.push_back(std::move(sequence).result());
        }
        mStats.accepted.resize(mStats.drafted.size());
        made.stats = std::move(mStats);
        return made;
    }

    void prefill(Cache& cache) {
        StepOutput const output = read(cache);
        count(output);
        take(output);
    }

    void plainStep(Cache& cache) {
        auto const started = Clock::now();
        StepOutput const output = read(cache);
        double const seconds = secondsSince(started);
        mStats.verifySeconds += seconds;
        count(output);
        mLength->learn({0, 1, 0, 0, 0, 0, seconds});
        Counts read;
        for (Sequence const& sequence : mSequences) read.push_back(sequence.left() > 0 ? 1 : 0);
        hold(output, read);
        take(output);
    }

    // Have the model read the unread tokens of every sequence: at first its prompt, later its newest token; none of a
    // sequence that has ended.
    StepOutput read(Cache& cache) {
        std::vector<Tokens> unread;
        Counts counts;
        for (Sequence const& sequence : mSequences) {
            unread.push_back(sequence.left() > 0 ? sequence.unread() : Tokens());
            counts.push_back(static_cast<int64_t>(unread.back().size()));
        }
        int64_t const size = *std::max_element(counts.begin(), counts.end());
        Array<int64_t> ids({cache.batch, size});
        for (size_t row = 0; row < unread.size(); ++row) {
            std::copy(unread[row].begin(), unread[row].end(), ids.data.begin() + static_cast<int64_t>(row) * size);
        }
        return mRunner.step(cache, std::move(ids), std::move(counts), mControls, Logits::kLast);
    }

    // Choose the next token of every sequence that has not ended.
    void take(StepOutput const& output) {
        for (Sequence& sequence : mSequences) {
            if (sequence.left() > 0) pick(sequence, Behind(output, sequence.row(), 0));
        }
    }

    // One round: draft up to `size` tokens of every sequence, verify them, and keep those that are correct.
    void speculate(Cache& cache, int64_t size) {
        Counts const start = cache.lengths;
        size_t const batch = mSequences.size();
        std::vector<Tokens> drafted(batch);
        std::vector<std::vector<double>> confidences(batch);
        double const draftSeconds = draftTokens(cache, size, drafted, confidences);
        size_t longest = 0;
        for (Tokens const& tokens : drafted) longest = std::max(longest, tokens.size());
        auto const began = Clock::now();
        Array<int64_t> ids({cache.batch, static_cast<int64_t>(longest) + 1});
        Counts counts(batch);
        int64_t alive = 0;
        for (size_t row = 0; row < batch; ++row) {
            auto const begin = ids.data.begin() + static_cast<int64_t>(row * (longest + 1));
            *begin = mSequences[row].newest();
            std::copy(drafted[row].begin(), drafted[row].end(), begin + 1);
            if (mSequences[row].left() == 0) continue;
            counts[row] = static_cast<int64_t>(drafted[row].size()) + 1;
            ++alive;
        }
        StepOutput const output = mDraft->verify(cache, start, std::move(ids), std::move(counts));
        double const verifySeconds = secondsSince(began);
        count(output);
        Round round{static_cast<int64_t>(longest), 0, 0, 0, 0, draftSeconds, verifySeconds};
        Counts stays = start;
        int64_t tokens = 0;
        for (Sequence& sequence : mSequences) {
            if (sequence.left() == 0) continue;
            int64_t const taken = accept(sequence, output, drafted[sequence.row()], confidences[sequence.row()], round);
            tokens += taken;
            stays[sequence.row()] += taken;
        }
        cache.rollBack(stays);
        Counts read;
        for (size_t row = 0; row < batch; ++row) read.push_back(stays[row] - start[row]);
        hold(output, read);
        mStats.draftSeconds += draftSeconds;
        mStats.verifySeconds += verifySeconds;
        round.tokens = static_cast<double>(tokens) / static_cast<double>(alive);
        mLength->learn(round);
    }

    // Take the model's own tokens as far as the draft agrees with them, plus the first one after. Returns how many.
    int64_t accept(Sequence& sequence, StepOutput const& output, Tokens const& drafted,
                   std::vector<double> const& confidences, Round& round) {
        size_t right = 0;
        int64_t token = 0;
        while (true) {
            token = pick(sequence, Behind(output, sequence.row(), right));
            if (sequence.left() == 0 || right == drafted.size() || token != drafted[right]) break;
            ++right;
        }
        // Tokens drafted after a wrong one, or after the end of a sequence, count neither as right nor as wrong.
        bool const missed = right < drafted.size() && token != drafted[right];
        size_t const hits = right + (right < drafted.size() && !missed ? 1 : 0);
        size_t const judged = hits + (missed ? 1 : 0);
        round.accepted += static_cast<int64_t>(hits);
        round.rejected += missed ? 1 : 0;
        double sum = 0;
        for (size_t place = 0; place < judged; ++place) sum += confidences[place];
        round.confidence += sum;
        countPlaces(mStats.drafted, judged);
        countPlaces(mStats.accepted, hits);
        return static_cast<int64_t>(right) + 1;
    }

    // Draft up to `size` tokens of every sequence, each with the draft's confidence. Returns the time of the draft steps in
    // seconds.
    double draftTokens(Cache& cache, int64_t size, std::vector<Tokens>& drafted,
                       std::vector<std::vector<double>>& confidences) {
        Array<int64_t> ids = newest();
        Counts going;
        // Sequences near their limit, or a change of their thresholds, draft fewer tokens.
        for (Sequence const& sequence : mSequences) going.push_back(sequence.mostDrafts() > 0 ? 1 : 0);
        std::vector<double> together(mSequences.size(), 1.0);
        double seconds = 0;
        for (int64_t step = 0; step < size; ++step) {
            auto const began = Clock::now();
            StepOutput const guess = mDraft->step(cache, ids, going);
            seconds += secondsSince(began);
            count(guess);
            bool anyGoes = false;
            for (Sequence const& sequence : mSequences) {
                size_t const row = sequence.row();
                ids.data[row] = 0;  // arbitrary: a sequence that stops drafting has a count of 0
                if (going[row] == 0) continue;
                Behind logits(guess, row, 0);
                ids.data[row] = choose(logits, sequence, drafted[row]);
                drafted[row].push_back(ids.data[row]);
                confidences[row].push_back(logits.likely ? mPicker.confidence(*logits.likely)
                                                         : mPicker.confidence(logits.row()));
                together[row] *= confidences[row].back();
                bool const goes = step + 1 < sequence.mostDrafts() && mLength->goesOn(step + 1, together[row]);
                going[row] = goes ? 1 : 0;
                anyGoes = anyGoes || goes;
            }
            if (!anyGoes) break;
        }
        return seconds;
    }

    static void countPlaces(std::vector<int64_t>& counts, size_t number) {
        if (counts.size() < number) counts.resize(number);
        for (size_t place = 0; place < number; ++place) ++counts[place];
    }

    // Count what the new tokens of a call kept, and set the thresholds of the next ones; of each sequence the first `read`
    // tokens stay.
    void hold(StepOutput const& output, Counts const& read) {
        std::vector<Hold const*> holds(mSequences.size(), nullptr);
        bool changed = false;
        for (Sequence& sequence : mSequences) {
            std::optional<Hold>& own = sequence.hold();
            if (!own) continue;
            holds[sequence.row()] = &*own;
            auto const first = static_cast<int64_t>(sequence.row()) * output.keptByToken.shape[1];
            for (int64_t token = 0; token < read[sequence.row()]; ++token) {
                if (own->read(output.keptByToken.data[static_cast<size_t>(first + token)])) changed = true;
            }
        }
        if (!changed) return;
        mControls = withThresholds(*mControls, holds);
        if (mDraft != nullptr) mDraft->begin(mControls);
    }

    // Count the kept rows of a call that the model itself would have made too.
    void count(StepOutput const& output) {
        if (output.kept.empty()) return;
        for (auto const& layer : output.kept) {
            for (int64_t const rows : layer) mStats.keptRows += rows;
        }
        mStats.gatedRows += output.gatedRows;
    }

    // What is known of the logits behind one token of a call.
    struct Behind {
        Behind(StepOutput const& output, size_t row, size_t token) {
            if (output.likely) {
                likely = output.likely->of(static_cast<int64_t>(row), static_cast<int64_t>(token));
                return;
            }
            auto const tokens = static_cast<size_t>(output.logits.shape[1]);
            auto const size = static_cast<size_t>(output.logits.shape[2]);
            all = {output.logits.data.data() + (row * tokens + token) * size, size};
        }

        // All logits.
        LogitsRow row() {
            if (likely) set(likely->whole());
            return all;
        }

        void set(std::vector<float> logits) {
            own = std::move(logits);
            all = {own.data(), own.size()};
            likely.reset();
        }

        std::optional<Likeliest> likely;
        std::vector<float> own;
        LogitsRow all{nullptr, 0};
    };

    // A token behind drafted ones, from the logits after biases and penalties, which take their place.
    int64_t choose(Behind& logits, Sequence const& sequence, Tokens const& drafted) const {
        Sampling const& sampling = mPicker.sampling();
        int64_t const place = sequence.place() + static_cast<int64_t>(drafted.size());
        if (sampling.adjusts()) {
            Tokens fresh = sequence.tokens();
            fresh.insert(fresh.end(), drafted.begin(), drafted.end());
            logits.set(adjusted(logits.row(), sampling, sequence.prompt(), fresh));
        }
        if (logits.likely && suffices(*logits.likely, sampling)) {
            return mPicker.pick(*logits.likely, sequence.row(), place);
        }
        return mPicker.pick(logits.row(), sequence.row(), place);
    }

    int64_t pick(Sequence& sequence, Behind logits) {
        if (!mLogprobs) {
            int64_t const token = choose(logits, sequence, {});
            sequence.add(token, mStops, mOnToken);
            return token;
        }
        std::vector<float> const own(logits.row().data, logits.row().data + logits.row().size);
        int64_t const token = choose(logits, sequence, {});
        sequence.record(logprobsOf({own.data(), own.size()}, token, *mLogprobs));
        sequence.add(token, mStops, mOnToken);
        return token;
    }

    // The newest token of each sequence, [B, 1].
    Array<int64_t> newest() const {
        Array<int64_t> ids({static_cast<int64_t>(mSequences.size()), 1});
        for (Sequence const& sequence : mSequences) ids.data[sequence.row()] = sequence.newest();
        return ids;
    }

    Runner& mRunner;
    Draft* mDraft;
    std::unique_ptr<DraftLength> mLength;
    Picker mPicker;
    std::shared_ptr<Controls const> mControls;
    std::optional<int64_t> mLogprobs;
    OnToken const& mOnToken;
    std::set<int64_t> mStops;
    std::vector<Sequence> mSequences;
    GenerationStats mStats;
};

}  // namespace

Generation generate(Runner& runner, Draft* draft, std::optional<int64_t> firstLength, std::vector<Tokens> const& prompts,
                    Options const& options) {
    checkRequest(prompts, options, runner.manifest());
    std::unique_ptr<DraftLength> length;
    if (draft != nullptr && !options.draftLength) {
        length = std::make_unique<AdaptiveLength>(firstLength);
    } else {
        length = std::make_unique<FixedLength>(options.draftLength.value_or(0));
    }
    return Loop(runner, draft, std::move(length), prompts, options).run();
}

}  // namespace gsx
