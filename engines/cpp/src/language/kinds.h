// Which tokenizers are read: those for which every part of `tokenizer.json` means here what it means in `tokenizers`.

#pragma once

#include <nlohmann/json.hpp>
#include <string>

namespace gsx {

// The first part of a `tokenizer.json` that is not read; empty if all are.
std::string unreadPart(nlohmann::json const& tokenizer);

// Whether the tokenizer brings texts into Unicode's composed form (NFC), as Qwen's do.
bool composes(nlohmann::json const& tokenizer);

// The special tokens that are put before and behind a text, by the file's post-processor.
struct Around {
    std::vector<int64_t> before;
    std::vector<int64_t> behind;
};
Around aroundText(nlohmann::json const& tokenizer);

}  // namespace gsx
