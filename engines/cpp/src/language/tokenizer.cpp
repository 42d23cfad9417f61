#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <functional>  // which the next header needs and does not include
#include <map>
#include <set>

#include <pytorch/tokenizers/hf_tokenizer.h>

#include <nlohmann/json.hpp>

#include "files.h"
#include "gsx/error.h"
#include "gsx/language.h"
#include "language/kinds.h"
#include "language/segments.h"
#include "language/utf8.h"

namespace gsx {
namespace {

using nlohmann::json;

constexpr char const* kTokenizer = "tokenizer.json";
constexpr char const* kSettings = "tokenizer_config.json";

[[noreturn]] void refuse(std::filesystem::path const& path, std::string const& unread) {
    throw BundleError(path.string() + ": is a tokenizer that is not read here",
                      {"byte-level BPE", unread, "give token ids in place of text, or use gsx generate"});
}

// The bytes that a character of a byte-level vocabulary stands for (GPT-2's table): printable ones for themselves, the others
// for characters from U+0100 on.
std::map<std::string, char> byteTable() {
    std::map<std::string, char> table;
    auto const utf8 = [](int point) {
        if (point < 0x80) return std::string(1, static_cast<char>(point));
        return std::string{static_cast<char>(0xC0 | point >> 6), static_cast<char>(0x80 | (point & 0x3F))};
    };
    int next = 0x100;
    for (int byte = 0; byte < 0x100; ++byte) {
        bool const shown = (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
        table[utf8(shown ? byte : next++)] = static_cast<char>(byte);
    }
    return table;
}

// The library reads only files: this one is in memory.
tokenizers::Error load(tokenizers::HFTokenizer& library, std::string const& content) {
    int const file = memfd_create("tokenizer.json", MFD_CLOEXEC);
    size_t written = 0;
    while (file >= 0 && written < content.size()) {
        ssize_t const size = ::write(file, content.data() + written, content.size() - written);
        if (size <= 0) break;
        written += static_cast<size_t>(size);
    }
    bool const whole = file >= 0 && written == content.size();
    tokenizers::Error const error =
        whole ? library.load("/proc/self/fd/" + std::to_string(file)) : tokenizers::Error::LoadFailure;
    if (file >= 0) ::close(file);
    return error;
}

bool hasToken(std::vector<Segment> const& segments) {
    return std::any_of(segments.begin(), segments.end(), [](Segment const& one) { return one.token.has_value(); });
}

}  // namespace

struct Tokenizer::Parts {
    tokenizers::HFTokenizer library;
    Around around;
    // The bytes of tokens, by id; those of special tokens are missing.
    std::map<int64_t, std::string> bytes;
    std::map<std::string, int64_t> added;
    std::set<int64_t> addedIds;
    bool composes = false;
};

Tokenizer::Tokenizer(Bundle const& bundle) : mParts(std::make_unique<Parts>()) {
    std::filesystem::path const path = bundle.directory / kTokenizer;
    std::optional<std::string> const content = contentOf(path);
    if (!content) {
        throw BundleError("bundle " + bundle.directory.string() + ": has no tokenizer",
                          {kTokenizer, {}, "put the model's tokenizer.json into the bundle, or give token ids in place of text"});
    }
    std::string library;
    try {
        json raw = json::parse(*content);
        if (std::string const unread = unreadPart(raw); !unread.empty()) refuse(path, unread);
        json const settings = json::parse(contentOf(bundle.directory / kSettings).value_or("{}"), nullptr, false);
        if (settings.is_object() && settings.value("split_special_tokens", json()) == true) refuse(path, "split_special_tokens");
        mParts->around = aroundText(raw);
        mParts->composes = composes(raw);
        std::map<std::string, char> const table = byteTable();
        for (auto const& [token, id] : raw.at("model").at("vocab").items()) {
            std::string& bytes = mParts->bytes[id.get<int64_t>()];
            for (std::string_view rest = token; !rest.empty();) {
                size_t const size = firstUnit(rest).size;
                auto const found = table.find(std::string(rest.substr(0, size)));
                bytes += found != table.end() ? std::string(1, found->second) : std::string(rest.substr(0, size));
                rest.remove_prefix(size);
            }
        }
        for (json const& token : raw.at("added_tokens")) {
            auto const id = token.at("id").get<int64_t>();
            mParts->added[token.at("content")] = id;
            mParts->addedIds.insert(id);
            mParts->bytes[id] = token.at("content");
            if (token.at("special") == true) mParts->bytes.erase(id);
        }
        raw["normalizer"] = nullptr;  // the library's own NFC drops accents
        library = raw.dump();
    } catch (json::exception const& error) {
        throw BundleError(path.string() + ": cannot be read as a tokenizer", {{}, error.what(), {}});
    }
    tokenizers::Error const error = load(mParts->library, library);
    if (error != tokenizers::Error::Ok) refuse(path, "error " + std::to_string(static_cast<int>(error)) + " of the library");
}

Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;
Tokenizer::~Tokenizer() = default;

Tokens Tokenizer::encode(std::string const& text) const {
    Tokens ids = mParts->around.before;
    Tokens const own = encodeRendered(text);
    ids.insert(ids.end(), own.begin(), own.end());
    ids.insert(ids.end(), mParts->around.behind.begin(), mParts->around.behind.end());
    return ids;
}

Tokens Tokenizer::encodeRendered(std::string const& text) const {
    if (!isUtf8(text)) throw UsageError("the prompt is not UTF-8 text");
    Tokens ids;
    for (Segment const& segment : segmentsOf(text, mParts->added)) {
        if (segment.token) {
            ids.push_back(*segment.token);
            continue;
        }
        std::string const part = mParts->composes ? composed(segment.text) : std::string(segment.text);
        // A text that names an added token only after it was composed has no such token, but the library would see one.
        bool const named = mParts->composes && hasToken(segmentsOf(part, mParts->added));
        auto const found = mParts->library.encode(part, 0, 0);
        if (named || !found.ok()) throw UsageError("the tokenizer cannot read this text");
        ids.insert(ids.end(), found.get().begin(), found.get().end());
    }
    return ids;
}

std::string Tokenizer::decode(Tokens const& ids) const {
    std::string bytes;
    for (int64_t const id : ids) bytes += bytesOf(id);
    return takeCharacters(bytes, true);
}

std::string Tokenizer::bytesOf(int64_t id) const {
    auto const found = mParts->bytes.find(id);
    return found == mParts->bytes.end() ? "" : found->second;
}

bool Tokenizer::isAdded(int64_t id) const { return mParts->addedIds.count(id) != 0; }

}  // namespace gsx
