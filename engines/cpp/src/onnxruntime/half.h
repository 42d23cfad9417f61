// float16 as graphs in half precision have it, for the values of which the host reads some.

#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

namespace gsx {

inline float floatOf(uint16_t half) {
    int const exponent = half >> 10 & 0x1F;
    auto const fraction = static_cast<float>(half & 0x3FF);
    float const size = exponent == 0    ? std::ldexp(fraction, -24)
                       : exponent < 31  ? std::ldexp(fraction + 1024, exponent - 25)
                       : fraction == 0  ? std::numeric_limits<float>::infinity()
                                        : std::numeric_limits<float>::quiet_NaN();
    return (half & 0x8000) != 0 ? -size : size;
}

// The nearest float16, ties to even.
inline uint16_t halfOf(float value) {
    uint16_t const sign = std::signbit(value) ? 0x8000 : 0;
    float const size = std::fabs(value);
    if (std::isnan(value)) return sign | 0x7E00;
    constexpr float kTooLarge = 65520;  // rounds to infinity
    if (size >= kTooLarge) return sign | 0x7C00;
    constexpr float kLeastNormal = 6.103515625e-05F;
    if (size < kLeastNormal) return sign | static_cast<uint16_t>(std::nearbyint(std::ldexp(size, 24)));
    int exponent = 0;
    float const fraction = std::frexp(size, &exponent);  // [0.5, 1)
    // 1024 to 2048; a fraction that rounds up to 2048 carries into the exponent, as the format has it.
    auto const rounded = static_cast<int>(std::nearbyint(std::ldexp(fraction, 11)));
    return static_cast<uint16_t>(sign | (((exponent + 13) << 10) + rounded));
}

}  // namespace gsx
