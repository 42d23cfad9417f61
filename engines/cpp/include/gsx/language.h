// Text in and out: a bundle's tokenizer, and its chat template. Built with GSX_TEXT.

#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "gsx/bundle.h"
#include "gsx/generation.h"

namespace gsx {

// The tokenizer of a bundle: byte-level BPE, which most models have. What the library behind it would read in another way than
// Hugging Face's `tokenizers` is refused, so ids are the same as in Python or there are none.
class Tokenizer {
public:
    // Throws BundleError: the bundle has no tokenizer, or one of another kind; it says which.
    explicit Tokenizer(Bundle const& bundle);
    Tokenizer(Tokenizer&&) noexcept;
    Tokenizer& operator=(Tokenizer&&) noexcept;
    ~Tokenizer();

    // Ids of a text in UTF-8, with the tokens that the model expects at its beginning.
    // Throws UsageError: a text that is not UTF-8, or that the tokenizer has no ids for.
    Tokens encode(std::string const& text) const;
    // Ids of a text that names its special tokens itself, as a chat template writes it.
    Tokens encodeRendered(std::string const& text) const;
    // Text of ids, without special tokens.
    std::string decode(Tokens const& ids) const;
    // The bytes of a token; empty for special tokens and for ids that the tokenizer does not know.
    std::string bytesOf(int64_t id) const;
    // Whether a token is never split: special ones, and others with a meaning of their own.
    bool isAdded(int64_t id) const;

private:
    struct Parts;
    std::unique_ptr<Parts> mParts;
};

// The text of ids that arrive one by one: whole characters only.
class TextStream {
public:
    explicit TextStream(Tokenizer const& tokenizer) : mTokenizer(&tokenizer) {}
    // The text that a token completes.
    std::string push(int64_t id);
    // What is left at the end; bytes that are no character become U+FFFD.
    std::string finish();

private:
    Tokenizer const* mTokenizer;
    std::string mHeld;
};

// The text of ids up to a stop text. What may be the beginning of one is held back until more of the text is known.
class TextWriter {
public:
    // Throws UsageError: a stop text that is empty, or not UTF-8.
    TextWriter(Tokenizer const& tokenizer, std::vector<std::string> stops);
    // Add a token. Returns: whether the text now has a stop text.
    bool push(int64_t id);
    // The new text since the last call.
    std::string take();
    // At the end: what has not been taken, up to a stop text.
    std::string finish();

private:
    bool add(std::string const& text);

    TextStream mStream;
    std::vector<std::string> mStops;
    std::string mReady;
    std::string mHeld;
    bool mStopped = false;
};

struct Message {
    std::string role;
    std::string content;
};

// The chat template of a bundle. It sees the messages and the names of the special tokens, and nothing else.
class ChatTemplate {
public:
    // `tokenizer` must outlive the template.
    // Throws UsageError: the bundle has no template. Throws BundleError: it is not the exported one, or cannot be read.
    ChatTemplate(Bundle const& bundle, Tokenizer const& tokenizer);
    ChatTemplate(ChatTemplate&&) noexcept;
    ~ChatTemplate();

    // The text of a chat; `answerBegins`: with what comes before an answer at its end.
    // Throws UsageError: the template refuses the messages.
    std::string render(std::vector<Message> const& messages, bool answerBegins = true) const;
    // Ids of a chat up to where the next answer begins.
    Tokens prompt(std::vector<Message> const& messages) const;
    // The tokens that end an answer: those that end a text, and the one that the template writes behind answers.
    Tokens const& stopIds() const;

private:
    struct Parts;
    std::unique_ptr<Parts> mParts;
};

}  // namespace gsx
