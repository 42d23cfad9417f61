// SHA-256 (FIPS 180-4). Our own, in place of a library such as PicoSHA2, so that loading a bundle has no further dependency.

#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>

namespace gsx {

class Sha256 {
public:
    void update(void const* data, size_t size);
    // The hash in hexadecimal. The object cannot be used any further.
    std::string finish();

private:
    void compress(uint8_t const* block);

    std::array<uint32_t, 8> mState = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                      0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    std::array<uint8_t, 64> mBlock{};
    size_t mFilled = 0;
    uint64_t mBytes = 0;
};

// Hash of a file's content. Throws BundleError if it cannot be read.
std::string sha256Of(std::filesystem::path const& path);

}  // namespace gsx
