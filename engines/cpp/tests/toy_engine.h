// The toy model of tests/vectors/toy.py, with the same numbers: tests the decoding logic without a GPU.

#pragma once

#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "gsx/engine.h"
#include "gsx/manifest.h"
#include "sha256.h"

// A 32-bit hash of whole numbers.
uint32_t mix(std::vector<uint32_t> const& values);

// K or V of a layer, [B, 1, capacity, 1]; or all logits of a step.
struct ToyBuffer final : gsx::Buffer {
    explicit ToyBuffer(gsx::Shape const& shape) : array(shape) {}
    gsx::Array<float> array;
};

// One graph of the toy model; every call is added to the digest.
class ToyEngine final : public gsx::Engine {
public:
    ToyEngine(gsx::Manifest const& manifest, std::string graph, gsx::Sha256& digest);

    std::shared_ptr<gsx::Buffer> buffer(gsx::Shape const& shape, std::string const& name) override;
    gsx::Array<float> read(gsx::BoundBuffer const& rows, std::string const& name) override;
    gsx::Values run(size_t profile, gsx::Values const& feeds, gsx::SharedBuffers const& bound,
                    std::map<std::string, gsx::Shape> const& results) override;

private:
    // A token of the call: its sequence, and its position in the call.
    using Token = std::pair<int64_t, int64_t>;

    struct Pair {
        gsx::Array<float> key;
        gsx::Array<float> value;
    };

    void takeIn(size_t profile, gsx::Values const& feeds, std::map<std::string, gsx::Shape> const& results);
    bool skippable(int64_t layer, gsx::Branch branch) const;
    std::vector<Token> kept(int64_t layer, gsx::Branch branch, std::vector<Token> const& tokens,
                            gsx::Values const& feeds) const;
    void write(int64_t layer, std::vector<Token> const& tokens, std::set<Token> const& kept, gsx::Values const& feeds,
               gsx::Buffers const& buffers, Pair& below) const;
    uint32_t attend(int64_t layer, int64_t sequence, int64_t place, gsx::Values const& feeds,
                    gsx::Buffers const& buffers) const;
    gsx::Array<float> logits(std::set<Token> const& tokens, gsx::Array<int64_t> const& logitsAt) const;
    uint32_t& state(Token token) { return mState[static_cast<size_t>(token.first * mSize + token.second)]; }
    uint32_t state(Token token) const { return mState[static_cast<size_t>(token.first * mSize + token.second)]; }

    gsx::Manifest const& mManifest;
    std::string mGraph;
    gsx::Sha256& mDigest;
    int64_t mFirst;
    int64_t mLast;
    int64_t mSize = 0;
    std::vector<uint32_t> mState;
};
