#include "language/segments.h"

#include <utf8proc.h>

#include <cstdlib>
#include <memory>
#include <new>

namespace gsx {

std::vector<Segment> segmentsOf(std::string_view text, std::map<std::string, int64_t> const& added) {
    // By first byte, so that most places of a text are looked at once.
    std::map<char, std::vector<std::map<std::string, int64_t>::value_type const*>> byFirst;
    for (auto const& token : added) {
        if (!token.first.empty()) byFirst[token.first[0]].push_back(&token);
    }
    std::vector<Segment> segments;
    size_t begin = 0;
    for (size_t at = 0; at < text.size();) {
        std::map<std::string, int64_t>::value_type const* found = nullptr;
        if (auto const candidates = byFirst.find(text[at]); candidates != byFirst.end()) {
            for (auto const* token : candidates->second) {
                if (text.compare(at, token->first.size(), token->first) == 0) found = token;
            }
        }
        if (found == nullptr) {
            ++at;
            continue;
        }
        if (at > begin) segments.push_back({text.substr(begin, at - begin), std::nullopt});
        segments.push_back({text.substr(at, found->first.size()), found->second});
        begin = at += found->first.size();
    }
    if (begin < text.size()) segments.push_back({text.substr(begin), std::nullopt});
    return segments;
}

std::string composed(std::string_view text) {
    utf8proc_uint8_t* made = nullptr;
    auto const* const bytes = reinterpret_cast<utf8proc_uint8_t const*>(text.data());
    auto const options = static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE);
    utf8proc_ssize_t const size = utf8proc_map(bytes, static_cast<utf8proc_ssize_t>(text.size()), &made, options);
    std::unique_ptr<utf8proc_uint8_t, decltype(&std::free)> const owner(made, &std::free);
    if (size < 0) throw std::bad_alloc();  // the text is UTF-8, so nothing else can be wrong
    return {reinterpret_cast<char const*>(made), static_cast<size_t>(size)};
}

}  // namespace gsx
