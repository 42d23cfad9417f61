#include "toy_engine.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>

#include "stage.h"
#include "tensor_names.h"

namespace {

using gsx::Array;
using gsx::Buffers;
using gsx::Shape;
using gsx::Values;

constexpr double kEndScore = 2;

Array<int64_t> const& ints(Values const& feeds, std::string const& name) {
    return std::get<Array<int64_t>>(feeds.at(name));
}

Array<float> const& floats(Values const& feeds, std::string const& name) {
    return std::get<Array<float>>(feeds.at(name));
}

// K or V of a layer, of the rows that a call runs.
struct Rows {
    Array<float>& array;
    int64_t first;
};

Rows bufferOf(Buffers const& buffers, int64_t layer, char const* kv) {
    gsx::BoundBuffer const& bound = buffers.at(gsx::names::kPast + std::to_string(layer) + "." + kv);
    return {static_cast<ToyBuffer&>(*bound.buffer).array, bound.row};
}

// Element [sequence, 0, column, 0].
float& element(Array<float>& array, int64_t sequence, int64_t column) {
    return array.data[static_cast<size_t>(sequence * array.shape[2] + column)];
}

std::string spelled(Shape const& shape) {
    std::string text;
    for (int64_t const size : shape) text += (text.empty() ? "" : ",") + std::to_string(size);
    return text;
}

// The likeliest tokens as an engine for steps gives them (_likeliest of tests/vectors/toy.py): of equal ones the last.
void addLikeliest(Values& found) {
    constexpr int64_t kLikely = 8;
    auto const& logits = std::get<Array<float>>(found.at("logits"));
    Array<int64_t> ids({logits.shape[0], logits.shape[1], kLikely});
    Array<float> likely(ids.shape);
    Array<float> totals({logits.shape[0], logits.shape[1]});
    auto const size = static_cast<size_t>(logits.shape[2]);
    for (size_t at = 0; at < totals.data.size(); ++at) {
        float const* const row = logits.data.data() + at * size;
        std::vector<int64_t> order(size);
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(), [&](int64_t one, int64_t other) { return row[one] < row[other]; });
        for (size_t i = 0; i < size; ++i) totals.data[at] += std::exp(row[i] - row[order.back()]);
        for (size_t i = 0; i < kLikely; ++i) {
            ids.data[at * kLikely + i] = order[size - kLikely + i];
            likely.data[at * kLikely + i] = row[order[size - kLikely + i]];
        }
    }
    found["likely_ids"] = std::move(ids);
    found["likely_logits"] = std::move(likely);
    found["likely_total"] = std::move(totals);
}

}  // namespace

uint32_t mix(std::vector<uint32_t> const& values) {
    uint32_t z = 0x9E3779B9;
    for (uint32_t const value : values) {
        z = (z ^ value) + 0x85EBCA6B;
        z = (z ^ z >> 16) * 0x7FEB352D;
        z = (z ^ z >> 15) * 0x846CA68B;
        z ^= z >> 16;
    }
    return z;
}

ToyEngine::ToyEngine(gsx::Manifest const& manifest, std::string graph, gsx::Sha256& digest)
    : mManifest(manifest), mGraph(std::move(graph)), mDigest(digest) {
    int64_t const depth = manifest.decoder.numLayers;
    int64_t const exit = mGraph == "model" ? depth : std::get<gsx::ExitDraft>(manifest.draft->draft).layer;
    mFirst = mGraph == "verify" ? exit : 0;
    mLast = mGraph == "verify" ? depth : exit;
}

std::shared_ptr<gsx::Buffer> ToyEngine::buffer(Shape const& shape, std::string const&) {
    return std::make_shared<ToyBuffer>(shape);
}

gsx::Array<float> ToyEngine::read(gsx::BoundBuffer const& rows, std::string const&) {
    gsx::Array<float> found(rows.shape);
    auto const& all = static_cast<ToyBuffer&>(*rows.buffer).array.data;
    auto const count = static_cast<int64_t>(found.data.size());
    std::copy_n(all.begin() + rows.row * count, count, found.data.begin());
    return found;
}

gsx::Values ToyEngine::run(size_t profile, Values const& feeds, gsx::SharedBuffers const& bound,
                           std::map<std::string, Shape> const& results) {
    Buffers const& buffers = *bound;
    takeIn(profile, feeds, results);
    Array<int64_t> const& ids = ints(feeds, "input_ids");
    Array<int64_t> const& mask = ints(feeds, "attention_mask");
    Array<int64_t> const& writeAt = ints(feeds, "write_at");
    int64_t const batch = ids.shape[0];
    mSize = ids.shape[1];
    mState.assign(ids.data.size(), 0);
    std::vector<Token> tokens;
    for (int64_t b = 0; b < batch; ++b) {
        auto const row = mask.data.begin() + b * mask.shape[1];
        int64_t const filled = std::count(row, row + mask.shape[1], 1);
        for (int64_t s = 0; s < mSize; ++s) {
            int64_t const place = writeAt.data[static_cast<size_t>(b)] + s;
            if (ints(feeds, "position_ids").data[static_cast<size_t>(b * mSize + s)] != place) {
                throw std::logic_error("positions do not begin at write_at");
            }
            if (place < filled) tokens.emplace_back(b, s);
        }
    }
    Shape const shape = {batch, 1, mSize, 1};
    Pair below{Array<float>(shape), Array<float>(shape)};
    for (size_t i = 0; i < mState.size(); ++i) {
        if (mGraph == "verify") mState[i] = static_cast<uint32_t>(floats(feeds, "exit_hidden").data[i]);
    }
    if (mGraph == "verify") {
        if (feeds.count("exit_key") != 0) below = {floats(feeds, "exit_key"), floats(feeds, "exit_value")};
    } else {
        for (Token const& token : tokens) {
            state(token) = mix({static_cast<uint32_t>(ids.data[static_cast<size_t>(token.first * mSize + token.second)])}) &
                           0xFFFF;
        }
    }
    Array<int64_t> counts(Shape{0});
    Array<int64_t> byToken({batch, mSize});
    for (int64_t layer = mFirst; layer < mLast; ++layer) {
        auto const number = static_cast<uint32_t>(layer);
        std::vector<Token> const attention = kept(layer, gsx::Branch::kAttention, tokens, feeds);
        write(layer, tokens, {attention.begin(), attention.end()}, feeds, buffers, below);
        for (Token const& token : attention) {
            int64_t const place = writeAt.data[static_cast<size_t>(token.first)] + token.second;
            uint32_t const seen = attend(layer, token.first, place, feeds, buffers);
            if (mix({seen, number, 2}) % 7 == 0) state(token) = mix({state(token), seen}) & 0xFFFF;
        }
        std::vector<Token> const mlp = kept(layer, gsx::Branch::kMlp, tokens, feeds);
        for (Token const& token : mlp) {
            uint32_t const change = mix({state(token), number, 3});
            if (change % 6 == 0) state(token) = change >> 8 & 0xFFFF;
        }
        for (auto const& [skippable, branch] : mManifest.skippablePlaces(layer, layer + 1)) {
            static_cast<void>(skippable);
            std::vector<Token> const& rows = branch == gsx::Branch::kAttention ? attention : mlp;
            counts.data.push_back(static_cast<int64_t>(rows.size()));
            for (auto const& [b, s] : rows) ++byToken.data[static_cast<size_t>(b * mSize + s)];
        }
    }
    counts.shape[0] = static_cast<int64_t>(counts.data.size());
    Array<float> hidden({batch, mSize, 1});
    std::copy(mState.begin(), mState.end(), hidden.data.begin());
    Values found = {{"logits", logits({tokens.begin(), tokens.end()}, ints(feeds, "logits_at"))},
                    {"exit_hidden", std::move(hidden)},
                    {"exit_key", std::move(below.key)},
                    {"exit_value", std::move(below.value)},
                    {"kept", std::move(counts)},
                    {"kept_by_token", std::move(byToken)}};
    addLikeliest(found);
    if (auto const stays = buffers.find("logits"); stays != buffers.end()) {
        static_cast<ToyBuffer&>(*stays->second.buffer).array = std::get<Array<float>>(found.at("logits"));
    }
    Values wanted;
    for (auto const& [name, size] : results) {
        auto value = found.extract(name);
        if (std::visit([](auto const& array) { return array.shape; }, value.mapped()) != size) {
            throw std::logic_error("unexpected shape of " + name);
        }
        wanted.insert(std::move(value));
    }
    return wanted;
}

void ToyEngine::takeIn(size_t profile, Values const& feeds, std::map<std::string, Shape> const& results) {
    auto const add = [&](std::string const& text) { mDigest.update(text.data(), text.size()); };
    add(mGraph + " " + std::to_string(profile) + "\n");
    for (auto const& [name, value] : feeds) {
        bool const isFloat = std::holds_alternative<Array<float>>(value);
        std::visit(
            [&, &named = name](auto const& array) {
                add(named + (isFloat ? " float32 " : " int64 ") + spelled(array.shape) + "\n");
                mDigest.update(array.data.data(), array.data.size() * sizeof(array.data[0]));
            },
            value);
    }
    for (auto const& [name, shape] : results) add(name + " " + spelled(shape) + "\n");
}

bool ToyEngine::skippable(int64_t layer, gsx::Branch branch) const {
    std::vector<gsx::Place> const places = mManifest.skippablePlaces(layer, layer + 1);
    return std::find(places.begin(), places.end(), gsx::Place(layer, branch)) != places.end();
}

namespace {

// A value of a sequence in a table with a row of `size` values for each sequence, or with one row for all.
double ofSequence(gsx::Array<float> const& table, int64_t sequence, int64_t size, int64_t place) {
    int64_t const row = static_cast<int64_t>(table.data.size()) == size ? 0 : sequence;
    return static_cast<double>(table.data[static_cast<size_t>(row * size + place)]);
}

}  // namespace

std::vector<ToyEngine::Token> ToyEngine::kept(int64_t layer, gsx::Branch branch, std::vector<Token> const& tokens,
                                              Values const& feeds) const {
    if (!skippable(layer, branch)) return tokens;
    auto const column = static_cast<uint32_t>(branch);
    auto const& ends = mManifest.decoder.eosIds;
    std::map<Token, double> scores;
    int64_t kept = 0;
    for (Token const& token : tokens) {
        int64_t const id = ints(feeds, "input_ids").data[static_cast<size_t>(token.first * mSize + token.second)];
        bool const isEnd = std::find(ends.begin(), ends.end(), id) != ends.end();
        kept += isEnd ? 1 : 0;
        uint32_t const hash = mix({state(token), static_cast<uint32_t>(layer), 10 + column});
        scores[token] = isEnd ? kEndScore : static_cast<double>(hash & 0xFF) / 256;
    }
    std::vector<Token> rows;
    if (feeds.count("full_until") != 0) {
        auto const table = static_cast<int64_t>(mManifest.decoder.numLayers) * gsx::kBranches;
        bool const masked = feeds.count("layer_mask") != 0;
        std::copy_if(tokens.begin(), tokens.end(), std::back_inserter(rows), [&](Token token) {
            auto const b = static_cast<size_t>(token.first);
            int64_t const place = ints(feeds, "write_at").data[b] + token.second;
            if (place < ints(feeds, "full_until").data[b] || scores[token] >= kEndScore) return true;
            if (!masked) return scores[token] < ofSequence(floats(feeds, "exit_threshold"), token.first, 1, 0);
            int64_t const at = token.first * table + layer * gsx::kBranches + column;
            return floats(feeds, "layer_mask").data[static_cast<size_t>(at)] != 0;
        });
        return rows;
    }
    if (feeds.count("loops") != 0) {
        int64_t const loop = mManifest.decoder.loops->loopOf(layer).value_or(0);
        std::copy_if(tokens.begin(), tokens.end(), std::back_inserter(rows), [&](Token token) {
            return loop < ints(feeds, "loops").data[static_cast<size_t>(token.first)];
        });
        return rows;
    }
    if (feeds.count("thresholds") != 0) {
        gsx::Array<float> const& thresholds = floats(feeds, "thresholds");
        int64_t const place = layer * gsx::kBranches + column;
        std::copy_if(tokens.begin(), tokens.end(), std::back_inserter(rows), [&](Token token) {
            return scores[token] > ofSequence(thresholds, token.first, mManifest.decoder.numLayers * gsx::kBranches, place);
        });
        return rows;
    }
    if (feeds.count("k") != 0) {
        kept = ints(feeds, "k").data[0];
    } else {
        auto const budget = static_cast<double>(floats(feeds, "budget").data[0]);
        kept += gsx::keptCount(static_cast<int64_t>(tokens.size()) - kept, budget);
    }
    rows = tokens;
    std::stable_sort(rows.begin(), rows.end(), [&](Token one, Token other) { return scores[one] > scores[other]; });
    rows.resize(static_cast<size_t>(kept));
    std::sort(rows.begin(), rows.end());
    return rows;
}

void ToyEngine::write(int64_t layer, std::vector<Token> const& tokens, std::set<Token> const& kept, Values const& feeds,
                      Buffers const& buffers, Pair& below) const {
    bool const copies = mManifest.kvPolicy == "copy" && layer > 0;
    for (uint32_t number = 0; number < 2; ++number) {
        Rows const buffer = bufferOf(buffers, layer, number == 0 ? "key" : "value");
        Array<float>& old = number == 0 ? below.key : below.value;
        Array<float> fresh(old.shape);
        for (Token const& token : tokens) {
            auto const [b, s] = token;
            float const own =
                static_cast<float>(mix({state(token), static_cast<uint32_t>(layer), number}) & 0xFFFF);
            element(fresh, b, s) = copies && kept.count(token) == 0 ? element(old, b, s) : own;
            element(buffer.array, buffer.first + b, ints(feeds, "write_at").data[static_cast<size_t>(b)] + s) = element(fresh, b, s);
        }
        old = std::move(fresh);
    }
}

uint32_t ToyEngine::attend(int64_t layer, int64_t sequence, int64_t place, Values const& feeds,
                           Buffers const& buffers) const {
    Array<int64_t> const& mask = ints(feeds, "attention_mask");
    Rows const key = bufferOf(buffers, layer, "key");
    Rows const value = bufferOf(buffers, layer, "value");
    uint32_t seen = 0;
    for (int64_t column = 0; column <= place; ++column) {
        if (mask.data[static_cast<size_t>(sequence * mask.shape[1] + column)] == 0) continue;
        seen = mix({seen, static_cast<uint32_t>(element(key.array, key.first + sequence, column)),
                    static_cast<uint32_t>(element(value.array, value.first + sequence, column))});
    }
    return seen;
}

Array<float> ToyEngine::logits(std::set<Token> const& tokens, Array<int64_t> const& logitsAt) const {
    int64_t const size = mManifest.decoder.vocabSize;
    Array<float> found({logitsAt.shape[0], logitsAt.shape[1], size});
    for (size_t i = 0; i < logitsAt.data.size(); ++i) {
        Token const token = {logitsAt.data[i] / mSize, logitsAt.data[i] % mSize};
        if (tokens.count(token) == 0) continue;
        for (int64_t v = 0; v < size; ++v) {
            auto const hash = static_cast<int64_t>(mix({state(token), static_cast<uint32_t>(v), 7}) % 61);
            found.data[i * static_cast<size_t>(size) + static_cast<size_t>(v)] = static_cast<float>(hash - 30) / 4;
        }
    }
    return found;
}
