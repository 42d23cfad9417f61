// A text as a tokenizer divides it before anything else: added tokens, and what is between them.

#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace gsx {

// A part of a text; `token`: the added token that it is.
struct Segment {
    std::string_view text;
    std::optional<int64_t> token;
};

// The parts of a text in their order. `added`: contents of added tokens, none of which begins like another.
std::vector<Segment> segmentsOf(std::string_view text, std::map<std::string, int64_t> const& added);

// Unicode's composed form (NFC) of a text in UTF-8.
std::string composed(std::string_view text);

}  // namespace gsx
