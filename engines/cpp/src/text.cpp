#include "text.h"

#include <array>
#include <charconv>
#include <cstdio>

namespace gsx {

std::string shortNumber(double value) {
    std::array<char, 32> text{};
    int const length = std::snprintf(text.data(), text.size(), "%g", value);
    return {text.data(), static_cast<size_t>(length)};
}

std::string exactNumber(double value) {
    std::array<char, 32> text{};
    std::string found(text.data(), std::to_chars(text.data(), text.data() + text.size(), value).ptr);
    if (found.find_first_not_of("-0123456789") == std::string::npos) found += ".0";
    return found;
}

std::string joinedBy(std::string const& separator, std::vector<std::string> const& parts) {
    std::string text;
    for (std::string const& part : parts) text += (text.empty() ? "" : separator) + part;
    return text;
}

}  // namespace gsx
