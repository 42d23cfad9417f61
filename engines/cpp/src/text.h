// Numbers and lists as people read them, spelled as Python's messages spell them.

#pragma once

#include <string>
#include <vector>

namespace gsx {

// As Python's format "g": six digits, no trailing zeros.
std::string shortNumber(double value);
// As Python's repr: all digits that matter, and always a sign of being no whole number.
std::string exactNumber(double value);
std::string joinedBy(std::string const& separator, std::vector<std::string> const& parts);

}  // namespace gsx
