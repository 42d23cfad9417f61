#include "language/kinds.h"

#include <algorithm>
#include <vector>

namespace gsx {
namespace {

using nlohmann::json;

json const& member(json const& object, char const* name) {
    static json const none;
    auto const found = object.is_object() ? object.find(name) : object.end();
    return object.is_object() && found != object.end() ? *found : none;
}

bool isSet(json const& value) { return !value.is_null() && value != false && value != ""; }

std::string typeOf(json const& part) { return part.is_null() ? "none" : member(part, "type").dump(); }

// The steps of a part that may be a sequence of others, under `list`.
std::vector<json> stepsOf(json const& part, char const* list) {
    if (part.is_null()) return {};
    if (member(part, "type") != "Sequence") return {part};
    std::vector<json> steps;
    for (json const& step : member(part, list)) {
        for (json& inner : stepsOf(step, list)) steps.push_back(std::move(inner));
    }
    return steps;
}

std::vector<json> normalizers(json const& tokenizer) { return stepsOf(member(tokenizer, "normalizer"), "normalizers"); }

std::string unreadModel(json const& model) {
    json const& type = member(model, "type");
    if (type != "BPE") return "a model of type " + type.dump();
    for (char const* name : {"dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"}) {
        if (isSet(member(model, name))) return std::string("a model with ") + name;
    }
    return "";
}

std::string unreadTokens(json const& added, bool normalizes) {
    std::vector<std::string> names;
    for (json const& token : added) {
        for (char const* flag : {"lstrip", "rstrip", "single_word", "normalized"}) {
            if (flag == std::string("normalized") && !normalizes) continue;
            if (isSet(member(token, flag))) return "an added token with " + std::string(flag) + ": " + token.at("content").dump();
        }
        names.push_back(token.at("content"));
    }
    std::sort(names.begin(), names.end());
    for (size_t i = 1; i < names.size(); ++i) {
        if (names[i].rfind(names[i - 1], 0) == 0) return "an added token that begins like another: " + json(names[i]).dump();
    }
    return "";
}

}  // namespace

std::string unreadPart(json const& tokenizer) {
    if (std::string const model = unreadModel(member(tokenizer, "model")); !model.empty()) return model;
    for (json const& step : normalizers(tokenizer)) {
        if (member(step, "type") != "NFC") return "a normalizer, " + typeOf(step);
    }
    std::vector<json> const splits = stepsOf(member(tokenizer, "pre_tokenizer"), "pretokenizers");
    for (json const& step : splits) {
        json const& type = member(step, "type");
        bool const isolates = type == "Split" && member(step, "behavior") == "Isolated" && !isSet(member(step, "invert"));
        bool const known = isolates || type == "Digits" || (type == "ByteLevel" && !isSet(member(step, "add_prefix_space")));
        if (!known) return "a pre-tokenizer, " + step.dump();
    }
    if (splits.empty() || member(splits.back(), "type") != "ByteLevel") return "a pre-tokenizer without ByteLevel at its end";
    if (member(member(tokenizer, "decoder"), "type") != "ByteLevel") return "a decoder, " + typeOf(member(tokenizer, "decoder"));
    for (json const& step : stepsOf(member(tokenizer, "post_processor"), "processors")) {
        json const& type = member(step, "type");
        if (type != "ByteLevel" && type != "TemplateProcessing") return "a post-processor, " + type.dump();
    }
    return unreadTokens(member(tokenizer, "added_tokens"), composes(tokenizer));
}

bool composes(json const& tokenizer) { return !normalizers(tokenizer).empty(); }

Around aroundText(json const& tokenizer) {
    Around around;
    for (json const& step : stepsOf(member(tokenizer, "post_processor"), "processors")) {
        if (member(step, "type") != "TemplateProcessing") continue;
        bool behind = false;
        for (json const& piece : step.at("single")) {
            if (piece.contains("Sequence")) {
                behind = true;
                continue;
            }
            std::string const name = piece.at("SpecialToken").at("id");
            for (json const& id : step.at("special_tokens").at(name).at("ids")) {
                (behind ? around.behind : around.before).push_back(id);
            }
        }
    }
    return around;
}

}  // namespace gsx
