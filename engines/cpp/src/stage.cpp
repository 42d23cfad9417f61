#include "stage.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "gsx/error.h"
#include "joining.h"
#include "profile_choice.h"
#include "sequence_values.h"
#include "tensor_names.h"
#include "text.h"
#include "token_axis.h"

namespace gsx {
namespace {

// Sequences run together while their numbers of tokens differ by no more than this (gsx_engines/runners/tensorrt.py).
constexpr int64_t kMostPadding = 32;

// A sequence's K or V must be a multiple of so many elements for TensorRT to take its address.
constexpr size_t kAlignedElements = 128;

// Kinds of calls whose bindings are kept.
constexpr size_t kMostBound = 64;

EngineGraph const& graphOf(EngineEntry const& entry, std::string const& name) {
    auto const found = entry.graphs.find(name);
    if (found == entry.graphs.end()) throw EngineError("there is no engine of " + name);
    return found->second;
}

Layers layersOf(Manifest const& manifest, std::string const& graph) {
    auto const [first, last] = manifest.layersOf(graph);
    return {first, last};
}

bool has(std::vector<TensorInfo> const& tensors, std::string const& name) {
    return std::any_of(tensors.begin(), tensors.end(), [&](TensorInfo const& tensor) { return tensor.name == name; });
}

// Of each sequence, the number of its last token in a call.
Counts lastOf(Call const& call) {
    Counts last;
    for (int64_t const count : call.counts) last.push_back(std::max<int64_t>(count - 1, 0));
    return last;
}

// The shape of an input or output, its named axes filled in.
Shape shapeOf(TensorInfo const& tensor, std::map<std::string, int64_t> const& sizes) {
    Shape shape;
    for (auto const& axis : tensor.shape) {
        if (auto const* size = std::get_if<int64_t>(&axis)) {
            shape.push_back(*size);
            continue;
        }
        auto const named = sizes.find(std::get<std::string>(axis));
        if (named == sizes.end()) {
            throw EngineError("the engine's tensor " + tensor.name + " has an unknown axis",
                              {"batch, sequence or logits_columns", std::get<std::string>(axis),
                               "build it again with gsx build of this version"});
        }
        shape.push_back(named->second);
    }
    return shape;
}

}  // namespace

Array<float> Engine::read(BoundBuffer const&, std::string const& name) {
    throw EngineError("this runtime does not read " + name + " from its memory");
}

size_t countOf(Shape const& shape) {
    size_t count = 1;
    for (int64_t const size : shape) count *= static_cast<size_t>(size);
    return count;
}

int64_t keptCount(int64_t n, double budget) {
    // A budget is a decimal of at most six places, so counting works on whole numbers.
    constexpr int64_t kMillion = 1'000'000;
    int64_t const millionths = std::llrint(budget * static_cast<double>(kMillion));
    if (millionths >= kMillion || n <= 1) return n;
    return n - 1 - (kMillion - millionths) * (n - 1) / kMillion;
}

Stage::Plan::Plan(EngineEntry const& ofEntry, std::string const& ofGraph, std::unique_ptr<Engine> ofEngine)
    : entry(ofEntry), graph(graphOf(ofEntry, ofGraph)), engine(std::move(ofEngine)), isStep(ofEntry.kvLayout == kStepLayout) {
    if (!has(graph.inputs, names::kLogitsAt) || !has(graph.outputs, names::kLogits)) {
        throw EngineError("the engine of " + ofGraph + " was not built by gsx",
                          {std::string("an input ") + names::kLogitsAt + " and an output " + names::kLogits, {},
                           "build it again with gsx build of this version"});
    }
    if (!tells(names::kLikelyIds)) return;
    for (TensorInfo const& output : graph.outputs) {
        if (output.name != names::kLogits) continue;
        Shape const shape = shapeOf(output, {});
        logits = BoundBuffer{engine->buffer(shape, output.name), shape};
    }
}

bool Stage::Plan::tells(std::string const& output) const { return has(graph.outputs, output); }

Stage::Stage(Manifest const& manifest, EngineEntry const& entry, std::string const& graph,
             std::unique_ptr<Engine> engine, std::vector<StepEngine> steps)
    : mManifest(manifest),
      mEntry(entry),
      mLayers(layersOf(manifest, graph)),
      mSkippable(manifest.skippablePlaces(mLayers.first, mLayers.last)),
      mPlan(entry, graph, std::move(engine)) {
    for (StepEngine& step : steps) {
        EngineProfile const& only = step.entry.profiles.front();
        mSteps.emplace(std::pair(only.batch.most, only.tokens.most), Plan(step.entry, graph, std::move(step.engine)));
    }
    mSplits = mPlan.engine->runsSomeRows();
    for (TensorInfo const& input : mPlan.graph.inputs) {
        if (!names::isPast(input.name)) continue;
        if (countOf(shapeOf(input, {{"batch", 1}})) % kAlignedElements != 0) mSplits = false;
    }
    for (Place const& place : mSkippable) {
        std::string const name = names::kRun + std::to_string(place.first) + "." + nameOf(place.second);
        if (has(mPlan.graph.inputs, name)) mRuns.emplace_back(place, name);
    }
}

StageMemory Stage::newMemory(int64_t batch, int64_t capacity) {
    std::string const build = "gsx build --backend " + mEntry.backend;
    if (capacity > mEntry.capacity) {
        throw EngineError("the engine's K/V buffers are too short for this request",
                          {"at most " + std::to_string(mEntry.capacity) + " tokens",
                           std::to_string(capacity) + ", prompt and new tokens together",
                           "ask for fewer new tokens, or " + build + " --context " + std::to_string(capacity)});
    }
    if (mostTokens(mEntry.profiles, batch) == 0) {
        std::vector<std::string> ranges;
        for (EngineProfile const& profile : mEntry.profiles) {
            ranges.push_back(std::to_string(profile.batch.least) + " to " + std::to_string(profile.batch.most));
        }
        throw EngineError("no profile of the engine allows so many sequences",
                          {"batch " + joinedBy(", ", ranges), std::to_string(batch),
                           build + " --batch " + std::to_string(batch)});
    }
    StageMemory memory;
    for (TensorInfo const& input : mPlan.graph.inputs) {
        if (!names::isPast(input.name)) continue;
        Shape const shape = shapeOf(input, {{"batch", batch}});
        BoundBuffer const bound{mPlan.engine->buffer(shape, input.name), shape};
        memory.buffers[input.name] = bound;
        std::string const present = names::presentAfter(input.name);
        if (mPlan.tells(present)) memory.buffers[present] = bound;
    }
    if (!mRuns.empty()) {
        int64_t most = 0;
        for (EngineProfile const& profile : mEntry.profiles) most = std::max(most, profile.batch.most * profile.tokens.most);
        memory.unread = mPlan.engine->buffer({most}, mRuns.front().second);
    }
    return memory;
}

StageOutput Stage::run(StageMemory& memory, Call const& call, ExitState const& state, Logits logits) {
    int64_t const most = mostTokens(mEntry.profiles, call.batch());
    if (call.size() <= most) return runParts(memory, call, state, logits);
    bool const ranks = mManifest.selection && mManifest.selection->mode == SelectionMode::kRank;
    if (ranks || (mManifest.decoder.loops && mManifest.decoder.loops->shareCaches)) {
        std::string const size = std::to_string(call.size());
        std::string const needs = ranks ? "rank selection needs" : "loops that share a cache need";
        throw EngineError("the prompt does not fit into one call of the engine, and " + needs + " all tokens in one call",
                          {"at most " + std::to_string(most) + " tokens", size,
                           "gsx build --profile prefill:2-" + size + " --profile decode:1" +
                               (ranks ? ", or export with --select threshold" : "")});
    }
    std::vector<StageOutput> pieces;
    for (int64_t start = 0; start < call.size(); start += most) {
        int64_t const stop = std::min(start + most, call.size());
        Call piece{someTokens(call.ids, start, stop), {}, {}, call.controls};
        for (size_t row = 0; row < call.counts.size(); ++row) {
            piece.counts.push_back(std::min(std::max<int64_t>(call.counts[row] - start, 0), most));
            piece.lengths.push_back(call.lengths[row] + std::min(call.counts[row], start));
        }
        ExitState part;
        for (auto const& [name, array] : state) part[name] = someTokens(array, start, stop);
        pieces.push_back(runParts(memory, piece, part, logits));
        load(pieces.back());
    }
    StageOutput joined = joinedPieces(pieces);
    if (logits == Logits::kLast) {  // for each sequence, from the piece that holds its last token; each has `most` tokens
        std::vector<int64_t> piece;
        for (int64_t const count : call.counts) piece.push_back(std::max<int64_t>(count - 1, 0) / most);
        joined.logits = tokenOfEach(joined.logits, piece);
    }
    return joined;
}

StageOutput Stage::runParts(StageMemory& memory, Call const& call, ExitState const& state, Logits logits) {
    std::vector<std::pair<int64_t, int64_t>> const parts = partsOf(call);
    if (parts.size() == 1 && parts[0].second - parts[0].first == call.batch()) {
        return runPart(memory, 0, call, state, logits);
    }
    std::vector<std::pair<int64_t, StageOutput>> outputs;
    for (auto const& [start, stop] : parts) {
        Counts const counts(call.counts.begin() + start, call.counts.begin() + stop);
        int64_t const tokens = *std::max_element(counts.begin(), counts.end());
        Call const part{someTokens(someRows(call.ids, start, stop), 0, tokens),
                        counts,
                        {call.lengths.begin() + start, call.lengths.begin() + stop},
                        std::make_shared<Controls>(valuesOfRows(*call.controls, start, stop))};
        ExitState entering;
        for (auto const& [name, array] : state) entering[name] = someTokens(someRows(array, start, stop), 0, tokens);
        outputs.emplace_back(start, runPart(memory, start, part, entering, logits));
        load(outputs.back().second);
    }
    return joinedRows(outputs, call, logits);
}

std::vector<std::pair<int64_t, int64_t>> Stage::partsOf(Call const& call) const {
    std::vector<std::pair<int64_t, int64_t>> const everything = {{0, call.batch()}};
    bool const any = std::any_of(call.counts.begin(), call.counts.end(), [](int64_t count) { return count > 0; });
    if (!any || (!mSplits && mRuns.empty())) return everything;
    if (mManifest.selection && mManifest.selection->mode == SelectionMode::kRank) return everything;
    std::vector<std::pair<int64_t, int64_t>> parts;
    std::optional<std::vector<bool>> last;
    for (int64_t row = 0; row < call.batch(); ++row) {
        int64_t const count = call.counts[static_cast<size_t>(row)];
        std::optional<std::vector<bool>> chosen;
        if (int64_t const full = mRuns.empty() ? 0 : fullOf(call, row); !mRuns.empty() && (full == 0 || full >= count)) {
            chosen = chosenOf(*call.controls, row, full > 0);
        }
        bool const same = mRuns.empty() || (chosen && chosen == last);
        last = chosen;
        if (count == 0) continue;
        if (same && !parts.empty() && parts.back().second == row) {
            auto const first = call.counts.begin() + parts.back().first;
            auto const [least, most] = std::minmax_element(first, call.counts.begin() + row + 1);
            if (*most - *least <= kMostPadding) {
                parts.back().second = row + 1;
                continue;
            }
        }
        parts.emplace_back(row, row + 1);
    }
    auto const fitsProfile = [&](std::pair<int64_t, int64_t> const& part) {
        int64_t const tokens = *std::max_element(call.counts.begin() + part.first, call.counts.begin() + part.second);
        return std::any_of(mEntry.profiles.begin(), mEntry.profiles.end(), [&](EngineProfile const& profile) {
            return fits(profile.batch, part.second - part.first) && fits(profile.tokens, tokens);
        });
    };
    return !mRuns.empty() || std::all_of(parts.begin(), parts.end(), fitsProfile) ? parts : everything;
}

StageOutput Stage::runPart(StageMemory& memory, int64_t start, Call const& call, ExitState const& state, Logits logits) {
    int64_t const full = mRuns.empty() || call.batch() > 1 ? 0 : fullOf(call, 0);
    if (full == 0 || full >= call.counts[0]) return runOnce(memory, start, call, state, logits);
    std::vector<StageOutput> outputs;
    for (auto const& [from, to] : {std::pair(int64_t{0}, full), std::pair(full, call.size())}) {
        Call const piece{someTokens(call.ids, from, to),
                         {std::min(call.counts[0], to) - from},
                         {call.lengths[0] + from},
                         call.controls};
        ExitState entering;
        for (auto const& [name, array] : state) entering[name] = someTokens(array, from, to);
        Logits const wanted = from == 0 && logits == Logits::kLast ? Logits::kNone : logits;
        outputs.push_back(runOnce(memory, start, piece, entering, wanted));
        load(outputs.back());
    }
    return joinedPieces(outputs);
}

int64_t Stage::fullOf(Call const& call, int64_t row) {
    auto const found = call.controls->find(names::kFullUntil);
    if (found == call.controls->end()) return 0;
    std::vector<int64_t> const& until = std::get<Array<int64_t>>(found->second).data;
    int64_t const own = until[std::min(static_cast<size_t>(row), until.size() - 1)];
    auto const at = static_cast<size_t>(row);
    return std::min(std::max<int64_t>(own - call.lengths[at], 0), call.counts[at]);
}

std::vector<bool> Stage::chosenOf(Controls const& controls, int64_t row, bool full) const {
    if (auto const found = controls.find(names::kLoops); found != controls.end()) {
        std::vector<int64_t> const& loops = std::get<Array<int64_t>>(found->second).data;
        int64_t const count = loops[std::min(static_cast<size_t>(row), loops.size() - 1)];
        std::vector<bool> chosen;
        for (auto const& [place, name] : mRuns) {
            chosen.push_back(mManifest.decoder.loops->loopOf(place.first).value_or(0) < count);
        }
        return chosen;
    }
    Array<float> const& mask = std::get<Array<float>>(controls.at(names::kLayerMask));
    int64_t const own = std::min(row, mask.shape[0] - 1);
    std::vector<bool> chosen;
    for (auto const& [place, name] : mRuns) {
        int64_t const at = (own * mask.shape[1] + place.first) * kBranches + static_cast<int64_t>(place.second);
        chosen.push_back(full || mask.data[static_cast<size_t>(at)] > 0.5F);
    }
    return chosen;
}

StageOutput Stage::runOnce(StageMemory& memory, int64_t start, Call const& call, ExitState const& state, Logits logits) {
    auto const ofSize = mSteps.find({call.batch(), call.size()});
    Plan& plan = ofSize == mSteps.end() ? mPlan : ofSize->second;
    // The window covers the rows beyond a sequence's count too: while there is room, no row of the mask is empty.
    int64_t const longest = *std::max_element(call.lengths.begin(), call.lengths.end());
    int64_t const window = plan.isStep ? mEntry.capacity : windowOf(longest + call.size(), mEntry.capacity);
    Values const feeds = feedsOf(plan, call, state, logits, window);
    std::map<std::string, int64_t> const sizes = {
        {"batch", call.batch()},
        {"sequence", call.size()},
        {"logits_columns", std::get<Array<int64_t>>(feeds.at(names::kLogitsAt)).shape[1]}};
    std::map<std::string, Shape> results;
    for (TensorInfo const& output : plan.graph.outputs) {
        bool const stays = memory.buffers.count(output.name) != 0 || (plan.logits && output.name == names::kLogits);
        if (!stays) results[output.name] = shapeOf(output, sizes);
    }
    size_t const profile = chooseProfile(plan.entry.profiles, call.batch(), call.size(), window);
    std::vector<bool> chosen;
    if (!mRuns.empty()) chosen = chosenOf(*call.controls, 0, fullOf(call, 0) > 0);
    SharedBuffers const buffers = boundOf(memory, plan, start, call, chosen);
    ++plan.calls;  // first: a call that fails may have overwritten the logits of the one before
    Values found = plan.engine->run(profile, feeds, buffers, results);
    StageOutput output;
    if (plan.logits && logits == Logits::kNone) {
        output.logits = Array<float>({call.batch(), 0, plan.logits->shape.back()});
    } else if (plan.logits) {
        std::vector<Counts> tokens(static_cast<size_t>(call.batch()), Counts(static_cast<size_t>(call.size())));
        for (Counts& row : tokens) std::iota(row.begin(), row.end(), 0);
        if (logits == Logits::kLast) {
            Counts const last = lastOf(call);
            for (size_t row = 0; row < tokens.size(); ++row) tokens[row] = {last[row]};
        }
        output.likely = likelyOf(plan, found, std::move(tokens));
    } else {
        output.logits = std::get<Array<float>>(std::move(found.at(names::kLogits)));
        if (plan.isStep && logits == Logits::kLast) output.logits = tokenOfEach(output.logits, lastOf(call));
        if (logits == Logits::kNone) output.logits = someTokens(output.logits, 0, 0);
    }
    for (std::string const& name : mManifest.exitState) {
        auto const part = found.find(name);
        if (part != found.end()) output.state[name] = std::get<Array<float>>(std::move(part->second));
    }
    output.kept = keptOf(found);
    if (auto const part = found.find(names::kKeptByToken); part != found.end()) {
        output.keptByToken = std::get<Array<int64_t>>(std::move(part->second));
    } else if (mSkippable.empty()) {
        output.keptByToken = Array<int64_t>({call.batch(), call.size()});
    }
    if (!mRuns.empty()) {  // padding is no token
        output.kept.resize(static_cast<size_t>(mManifest.decoder.numLayers));
        int64_t const tokens = std::accumulate(call.counts.begin(), call.counts.end(), int64_t{0});
        for (size_t i = 0; i < mRuns.size(); ++i) {
            auto const& [layer, branch] = mRuns[i].first;
            output.kept[static_cast<size_t>(layer)][static_cast<size_t>(branch)] = chosen[i] ? tokens : 0;
        }
    }
    return output;
}

SharedBuffers Stage::boundOf(StageMemory& memory, Plan const& plan, int64_t start, Call const& call,
                             std::vector<bool> const& chosen) const {
    auto const size = plan.isStep ? std::pair(call.batch(), call.size()) : std::pair<int64_t, int64_t>();
    StageMemory::Kind kind(size, start, call.batch(), mRuns.empty() ? 0 : call.size(), chosen);
    if (auto const known = memory.bound.find(kind); known != memory.bound.end()) return known->second;
    auto buffers = std::make_shared<Buffers>(memory.buffers);
    for (auto& [name, bound] : *buffers) {
        bound.shape[0] = call.batch();
        bound.row = start;
    }
    for (size_t i = 0; i < mRuns.size(); ++i) {
        (*buffers)[mRuns[i].second] = {memory.unread, {chosen[i] ? call.batch() * call.size() : 0}};
    }
    if (plan.logits) (*buffers)[names::kLogits] = *plan.logits;
    if (memory.bound.size() == kMostBound) memory.bound.clear();
    return memory.bound[std::move(kind)] = std::move(buffers);
}

Likeliest LikelyLogits::of(int64_t row, int64_t token) const {
    int64_t const count = ids.shape[2];
    int64_t const at = row * ids.shape[1] + token;
    std::vector<std::pair<int64_t, float>> both;
    for (int64_t i = at * count; i < (at + 1) * count; ++i) {
        both.emplace_back(ids.data[static_cast<size_t>(i)], logits.data[static_cast<size_t>(i)]);
    }
    std::sort(both.begin(), both.end());
    Likeliest found{{},
                    {},
                    totals.data[static_cast<size_t>(at)],
                    static_cast<size_t>(size),
                    [fetch = fetch, row, token] { return fetch(row, token); }};
    for (auto const& [id, logit] : both) {
        found.ids.push_back(id);
        found.logits.push_back(logit);
    }
    return found;
}

Array<float> LikelyLogits::whole() const {
    Array<float> all({totals.shape[0], totals.shape[1], size});
    for (int64_t at = 0; at < static_cast<int64_t>(totals.data.size()); ++at) {
        std::vector<float> const row = fetch(at / totals.shape[1], at % totals.shape[1]);
        std::copy(row.begin(), row.end(), all.data.begin() + at * size);
    }
    return all;
}

void Stage::load(StageOutput& output) {
    if (!output.likely) return;
    output.logits = output.likely->whole();
    output.likely.reset();
}

std::shared_ptr<LikelyLogits const> Stage::likelyOf(Plan& plan, Values const& found, std::vector<Counts> tokens) {
    // Of an output [B, S, ..] the numbers behind these tokens, [B, O, ..].
    auto const pick = [&](auto const& array, int64_t width) {
        auto some = array;
        some.data.clear();
        some.shape[1] = static_cast<int64_t>(tokens.front().size());
        for (size_t row = 0; row < tokens.size(); ++row) {
            for (int64_t const token : tokens[row]) {
                auto const begin = array.data.begin() + (static_cast<int64_t>(row) * array.shape[1] + token) * width;
                some.data.insert(some.data.end(), begin, begin + width);
            }
        }
        return some;
    };
    auto const& ids = std::get<Array<int64_t>>(found.at(names::kLikelyIds));
    auto const& logits = std::get<Array<float>>(found.at(names::kLikelyLogits));
    auto const& totals = std::get<Array<float>>(found.at(names::kLikelyTotal));
    Shape const shape = plan.logits->shape;
    auto made = std::make_shared<LikelyLogits>(
        LikelyLogits{pick(ids, ids.shape[2]), pick(logits, logits.shape[2]), pick(totals, 1), shape[2], {}});
    made->fetch = [&plan, shape, call = plan.calls, tokens = std::move(tokens)](int64_t row, int64_t token) {
        if (plan.calls != call) throw std::logic_error("the logits of a call are asked for after the next one");
        int64_t const at = row * shape[1] + tokens[static_cast<size_t>(row)][static_cast<size_t>(token)];
        return plan.engine->read({plan.logits->buffer, {1, shape[2]}, at}, names::kLogits).data;
    };
    return made;
}

Values Stage::feedsOf(Plan const& plan, Call const& call, ExitState const& state, Logits logits, int64_t window) const {
    int64_t const batch = call.batch();
    int64_t const size = call.size();
    Array<int64_t> mask({batch, window});
    Array<int64_t> positions({batch, size});
    bool const all = logits == Logits::kAll || plan.isStep;
    Array<int64_t> wanted({batch, all ? size : 1});
    Counts const last = lastOf(call);
    for (int64_t row = 0; row < batch; ++row) {
        auto const at = static_cast<size_t>(row);
        int64_t const filled = std::min(call.lengths[at] + call.counts[at], window);
        auto const columns = mask.data.begin() + row * window;
        std::fill(columns, columns + filled, 1);
        for (int64_t token = 0; token < size; ++token) {
            positions.data[static_cast<size_t>(row * size + token)] = call.lengths[at] + token;
        }
        for (int64_t column = 0; column < wanted.shape[1]; ++column) {
            int64_t const token = all ? column : last[at];
            wanted.data[static_cast<size_t>(row * wanted.shape[1] + column)] = row * size + token;
        }
    }
    Values given = {{names::kInputIds, call.ids},
                    {names::kAttentionMask, std::move(mask)},
                    {names::kPositionIds, std::move(positions)},
                    {names::kWriteAt, Array<int64_t>({batch}, call.lengths)},
                    {names::kLogitsAt, std::move(wanted)}};
    // A step has no open axis for values that stand for all sequences.
    for (auto& [name, value] : plan.isStep ? valuesOfEach(*call.controls, batch) : *call.controls) given[name] = value;
    for (auto const& [name, value] : state) given[name] = value;
    Values feeds;
    for (TensorInfo const& input : plan.graph.inputs) {
        auto const value = given.find(input.name);
        if (value != given.end()) {
            feeds.insert(given.extract(value));
        } else if (input.name == names::kCount) {
            // Rank selection for which the host counts K from the budget.
            auto const found = call.controls->find(names::kBudget);
            if (found == call.controls->end()) throw EngineError("the engine needs k, but the bundle has no budget");
            auto const budget = static_cast<double>(std::get<Array<float>>(found->second).data[0]);
            feeds[names::kCount] = Array<int64_t>({1}, {keptCountOf(call, budget)});
        } else if (!names::isPast(input.name) && input.name.rfind(names::kRun, 0) != 0) {
            throw EngineError("the engine has an unknown input",
                              {{}, input.name, "build it again with gsx build of this version"});
        }
    }
    return feeds;
}

int64_t Stage::keptCountOf(Call const& call, double budget) const {
    std::vector<int64_t> const& ends = mManifest.decoder.eosIds;
    int64_t valid = 0;
    int64_t kept = 0;
    for (int64_t row = 0; row < call.batch(); ++row) {
        int64_t const count = call.counts[static_cast<size_t>(row)];
        for (int64_t token = 0; token < count; ++token) {
            int64_t const id = call.ids.data[static_cast<size_t>(row * call.size() + token)];
            // End-of-text tokens are kept in addition to the best ones.
            if (std::find(ends.begin(), ends.end(), id) != ends.end()) ++kept;
            ++valid;
        }
    }
    return keptCount(valid - kept, budget) + kept;
}

bool Stage::countsTokens() const {
    auto const told = [](auto const& step) { return step.second.tells(names::kKeptByToken); };
    return mSkippable.empty() ||
           (mPlan.tells(names::kKeptByToken) && std::all_of(mSteps.begin(), mSteps.end(), told));
}

KeptTable Stage::keptOf(Values const& found) const {
    auto const counts = found.find(names::kKept);
    if (counts == found.end() || mSkippable.empty()) return {};
    std::vector<int64_t> const& rows = std::get<Array<int64_t>>(counts->second).data;
    if (rows.size() != mSkippable.size()) {
        throw EngineError("the engine counts a different number of branches than the manifest lists",
                          {std::to_string(mSkippable.size()), std::to_string(rows.size()), "build it again with gsx build"});
    }
    KeptTable table(static_cast<size_t>(mManifest.decoder.numLayers));
    for (size_t i = 0; i < mSkippable.size(); ++i) {
        auto const& [layer, branch] = mSkippable[i];
        table[static_cast<size_t>(layer)][static_cast<size_t>(branch)] = rows[i];
    }
    return table;
}

}  // namespace gsx
