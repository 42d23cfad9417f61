#include <algorithm>
#include <utility>

#include "gsx/error.h"
#include "gsx/language.h"
#include "language/utf8.h"

namespace gsx {
namespace {

// How many bytes at the end of a text may be the beginning of a stop text. (Whole characters: a stop text is UTF-8.)
size_t beginning(std::string const& text, std::vector<std::string> const& stops) {
    size_t most = 0;
    for (std::string const& stop : stops) {
        for (size_t size = std::min(stop.size() - 1, text.size()); size > most; --size) {
            if (text.compare(text.size() - size, size, stop, 0, size) == 0) most = size;
        }
    }
    return most;
}

}  // namespace

std::string TextStream::push(int64_t id) {
    mHeld += mTokenizer->bytesOf(id);
    return takeCharacters(mHeld, false);
}

std::string TextStream::finish() { return takeCharacters(mHeld, true); }

TextWriter::TextWriter(Tokenizer const& tokenizer, std::vector<std::string> stops)
    : mStream(tokenizer), mStops(std::move(stops)) {
    for (std::string const& stop : mStops) {
        if (stop.empty()) throw UsageError("a stop text is empty", {"at least one character", {}, {}});
        if (!isUtf8(stop)) throw UsageError("a stop text is not UTF-8 text");
    }
}

bool TextWriter::push(int64_t id) { return add(mStream.push(id)); }

std::string TextWriter::take() { return std::exchange(mReady, ""); }

std::string TextWriter::finish() {
    if (!mStopped && !add(mStream.finish())) mReady += std::exchange(mHeld, "");
    return take();
}

bool TextWriter::add(std::string const& text) {
    mHeld += text;
    size_t place = std::string::npos;
    for (std::string const& stop : mStops) place = std::min(place, mHeld.find(stop));
    mStopped = place != std::string::npos;
    size_t const count = mStopped ? place : mHeld.size() - beginning(mHeld, mStops);
    mReady += mHeld.substr(0, count);
    mHeld.erase(0, count);
    return mStopped;
}

}  // namespace gsx
