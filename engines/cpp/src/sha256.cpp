#include "sha256.h"

#include <algorithm>
#include <cstring>
#include <fstream>
#include <vector>

#include "gsx/error.h"

namespace gsx {
namespace {

constexpr std::array<uint32_t, 64> kRound = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};
constexpr size_t kBlock = 64;
constexpr size_t kPiece = size_t{1} << 20;

constexpr uint32_t rotated(uint32_t value, int bits) { return value >> bits | value << (32 - bits); }

}  // namespace

void Sha256::compress(uint8_t const* block) {
    std::array<uint32_t, 64> w{};
    for (size_t i = 0; i < 16; ++i) {
        w[i] = uint32_t{block[4 * i]} << 24 | uint32_t{block[4 * i + 1]} << 16 | uint32_t{block[4 * i + 2]} << 8 |
               uint32_t{block[4 * i + 3]};
    }
    for (size_t i = 16; i < 64; ++i) {
        uint32_t const low = rotated(w[i - 15], 7) ^ rotated(w[i - 15], 18) ^ w[i - 15] >> 3;
        uint32_t const high = rotated(w[i - 2], 17) ^ rotated(w[i - 2], 19) ^ w[i - 2] >> 10;
        w[i] = w[i - 16] + low + w[i - 7] + high;
    }
    auto [a, b, c, d, e, f, g, h] = mState;
    for (size_t i = 0; i < 64; ++i) {
        uint32_t const one =
            h + (rotated(e, 6) ^ rotated(e, 11) ^ rotated(e, 25)) + ((e & f) ^ (~e & g)) + kRound[i] + w[i];
        uint32_t const two = (rotated(a, 2) ^ rotated(a, 13) ^ rotated(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
        h = g;
        g = f;
        f = e;
        e = d + one;
        d = c;
        c = b;
        b = a;
        a = one + two;
    }
    std::array<uint32_t, 8> const added = {a, b, c, d, e, f, g, h};
    for (size_t i = 0; i < mState.size(); ++i) mState[i] += added[i];
}

void Sha256::update(void const* data, size_t size) {
    auto const* bytes = static_cast<uint8_t const*>(data);
    mBytes += size;
    while (size > 0) {
        if (mFilled == 0 && size >= kBlock) {
            compress(bytes);
            bytes += kBlock;
            size -= kBlock;
            continue;
        }
        size_t const part = std::min(size, kBlock - mFilled);
        std::memcpy(mBlock.data() + mFilled, bytes, part);
        mFilled += part;
        bytes += part;
        size -= part;
        if (mFilled == kBlock) {
            compress(mBlock.data());
            mFilled = 0;
        }
    }
}

std::string Sha256::finish() {
    uint64_t const bits = mBytes * 8;
    std::array<uint8_t, 2 * kBlock> tail{0x80};
    size_t const padding = (mFilled < 56 ? 56 : 120) - mFilled;
    for (size_t i = 0; i < 8; ++i) tail[padding + i] = static_cast<uint8_t>(bits >> (56 - 8 * i));
    update(tail.data(), padding + 8);
    std::string text;
    for (uint32_t const word : mState) {
        for (int shift = 28; shift >= 0; shift -= 4) text += "0123456789abcdef"[word >> shift & 15];
    }
    return text;
}

std::string sha256Of(std::filesystem::path const& path) {
    std::ifstream file(path, std::ios::binary);
    std::vector<char> piece(kPiece);
    Sha256 hash;
    while (file.read(piece.data(), static_cast<std::streamsize>(piece.size())) || file.gcount() > 0) {
        hash.update(piece.data(), static_cast<size_t>(file.gcount()));
    }
    if (file.bad() || !file.eof()) throw BundleError(path.string() + ": cannot be read");
    return hash.finish();
}

}  // namespace gsx
