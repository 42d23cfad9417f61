// UTF-8, as Rust's `String::from_utf8_lossy` reads it.

#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace gsx {

// The beginning of a text in UTF-8: a character, bytes that are none, or what may become one.
struct Unit {
    enum class Kind { kCharacter, kInvalid, kIncomplete };
    Kind kind;
    size_t size;
};

// The first unit of a text that is not empty.
inline Unit firstUnit(std::string_view text) {
    auto const byte = [&](size_t at) { return static_cast<unsigned char>(text[at]); };
    unsigned char const lead = byte(0);
    if (lead < 0x80) return {Unit::Kind::kCharacter, 1};
    size_t const size = lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : 2;
    if (lead < 0xC2 || lead > 0xF4) return {Unit::Kind::kInvalid, 1};
    for (size_t at = 1; at < size; ++at) {
        if (at == text.size()) return {Unit::Kind::kIncomplete, at};
        // The second byte leaves out long forms, surrogates, and what is above U+10FFFF.
        unsigned char const least = at > 1 ? 0x80 : lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
        unsigned char const most = at > 1 ? 0xBF : lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
        if (byte(at) < least || byte(at) > most) return {Unit::Kind::kInvalid, at};
    }
    return {Unit::Kind::kCharacter, size};
}

inline bool isUtf8(std::string_view text) {
    while (!text.empty()) {
        Unit const unit = firstUnit(text);
        if (unit.kind != Unit::Kind::kCharacter) return false;
        text.remove_prefix(unit.size);
    }
    return true;
}

// Take what can be said of a text: whole characters, and U+FFFD for bytes that are none. What may still become a character
// stays in it, unless the text has ended.
inline std::string takeCharacters(std::string& held, bool ended) {
    std::string taken;
    std::string_view rest = held;
    while (!rest.empty()) {
        Unit const unit = firstUnit(rest);
        if (unit.kind == Unit::Kind::kIncomplete && !ended) break;
        taken += unit.kind == Unit::Kind::kCharacter ? std::string(rest.substr(0, unit.size)) : "\xEF\xBF\xBD";
        rest.remove_prefix(unit.size);
    }
    held = std::string(rest);
    return taken;
}

}  // namespace gsx
