// Numbers and lists in messages, spelled as in Python's messages.

#pragma once

#include <string>
#include <vector>

namespace gsx {

// Like Python's format "g": six digits, no trailing zeros.
std::string shortNumber(double value);
// Like Python's repr: all significant digits, and a decimal point even for whole numbers.
std::string exactNumber(double value);
// The parts in one text, separated.
std::string joinedBy(std::string const& separator, std::vector<std::string> const& parts);

}  // namespace gsx
