#include <minja/minja.hpp>
#include <nlohmann/json.hpp>

#include "files.h"
#include "gsx/error.h"
#include "gsx/language.h"
#include "sha256.h"

namespace gsx {
namespace {

using nlohmann::json;

constexpr char const* kFile = "chat_template.jinja";
constexpr char const* kSettings = "tokenizer_config.json";
constexpr char const* kSpecialTokens = "special_tokens_map.json";
// An answer that no template writes by itself, to find what it writes behind answers.
constexpr char const* kAnswer = "gsx-answer";

json objectIn(std::filesystem::path const& path) {
    json found = json::parse(contentOf(path).value_or("{}"), nullptr, false);
    return found.is_object() ? found : json::object();
}

// As gsx_engines/chat.py finds it: a file of its own comes before an entry in another.
std::optional<std::string> templateIn(std::filesystem::path const& directory) {
    if (std::optional<std::string> text = contentOf(directory / kFile)) return text;
    json found = objectIn(directory / kSettings).value("chat_template", json());
    if (found.is_array()) {
        json named;
        for (json const& one : found) {
            if (one.is_object() && one.value("name", json()) == "default") named = one.value("template", json());
        }
        found = named;
    }
    if (!found.is_string() || found == "") return std::nullopt;
    return found.get<std::string>();
}

}  // namespace

struct ChatTemplate::Parts {
    Tokenizer const* tokenizer = nullptr;
    std::shared_ptr<minja::TemplateNode> root;
    // `bos_token` and the like.
    nlohmann::ordered_json names = nlohmann::ordered_json::object();
    Tokens stops;
};

ChatTemplate::ChatTemplate(Bundle const& bundle, Tokenizer const& tokenizer) : mParts(std::make_unique<Parts>()) {
    std::string const what = "bundle " + bundle.directory.string();
    std::optional<std::string> const text = templateIn(bundle.directory);
    if (std::optional<std::string> const& exported = bundle.manifest.chatTemplateSha256) {
        Sha256 hash;
        if (text) hash.update(text->data(), text->size());
        std::string const found = text ? hash.finish() : "none";
        if (found != *exported) {
            throw BundleError(what + ": its chat template does not match gsx.json",
                              {"sha256 " + *exported, found,
                               "the file changed after export: restore it, or run `gsx export` again"});
        }
    }
    if (!text) {
        throw UsageError(what + ": has no chat template",
                         {std::string(kFile) + ", or chat_template in " + kSettings, {},
                          "export a model that was trained for chats, or continue a text in place of a chat"});
    }
    try {
        mParts->root = minja::Parser::parse(*text, {true, true, false});
    } catch (std::exception const& error) {
        throw BundleError(what + ": the chat template cannot be read", {{}, error.what(), {}});
    }
    for (char const* file : {kSpecialTokens, kSettings}) {
        json const settings = objectIn(bundle.directory / file);
        for (auto const& [key, value] : settings.items()) {
            bool const names = key.size() > 6 && key.compare(key.size() - 6, 6, "_token") == 0;
            json const name = value.is_object() ? value.value("content", json()) : value;
            if (names && name.is_string()) mParts->names[key] = name.get<std::string>();
        }
    }
    mParts->tokenizer = &tokenizer;
    mParts->stops = bundle.manifest.decoder.eosIds;
    try {
        std::string const rendered = render({{"user", "?"}, {"assistant", kAnswer}}, false);
        size_t const at = rendered.rfind(kAnswer);
        Tokens const behind =
            at == std::string::npos ? Tokens() : tokenizer.encodeRendered(rendered.substr(at + std::string(kAnswer).size()));
        if (!behind.empty() && tokenizer.isAdded(behind[0])) mParts->stops.push_back(behind[0]);
    } catch (UsageError const&) {  // a template that refuses such a chat says nothing about the end of answers
    }
}

ChatTemplate::ChatTemplate(ChatTemplate&&) noexcept = default;
ChatTemplate::~ChatTemplate() = default;

std::string ChatTemplate::render(std::vector<Message> const& messages, bool answerBegins) const {
    nlohmann::ordered_json given = mParts->names;
    given["messages"] = nlohmann::ordered_json::array();
    for (Message const& message : messages) {
        given["messages"].push_back({{"role", message.role}, {"content", message.content}});
    }
    given["tools"] = nullptr;
    given["documents"] = nullptr;
    given["add_generation_prompt"] = answerBegins;
    try {
        return mParts->root->render(minja::Context::make(minja::Value(given)));
    } catch (std::exception const& error) {
        throw UsageError("the model's chat template refuses these messages",
                         {{}, error.what(),
                          "roles often have to alternate: user, assistant, user; some models take no system message"});
    }
}

Tokens ChatTemplate::prompt(std::vector<Message> const& messages) const {
    return mParts->tokenizer->encodeRendered(render(messages));
}

Tokens const& ChatTemplate::stopIds() const { return mParts->stops; }

}  // namespace gsx
