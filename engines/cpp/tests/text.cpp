// Text in and out: `gsx_text_of BUNDLE`. It reads lines of JSON and answers each with a line:
// `{"encode": text}` with ids, `{"rendered": text}` with ids, `{"decode": ids}` with the text at once and piece by piece,
// `{"chat": [{"role", "content"}]}` with the rendered text, its ids and the ids that end an answer.

#include <iostream>
#include <nlohmann/json.hpp>
#include <string>

#include "gsx/error.h"
#include "gsx/language.h"

namespace {

using nlohmann::json;

json answer(gsx::Bundle const& bundle, gsx::Tokenizer const& tokenizer, json const& request) {
    if (request.contains("encode")) return tokenizer.encode(request["encode"]);
    if (request.contains("rendered")) return tokenizer.encodeRendered(request["rendered"]);
    if (request.contains("decode")) {
        auto const ids = request["decode"].get<gsx::Tokens>();
        gsx::TextStream stream(tokenizer);
        json pieces = json::array();
        for (int64_t const id : ids) pieces.push_back(stream.push(id));
        pieces.push_back(stream.finish());
        return {tokenizer.decode(ids), pieces};
    }
    if (request.contains("stop")) {
        gsx::TextWriter writer(tokenizer, request["stop"]);
        std::string text;
        bool stopped = false;
        size_t read = 0;
        for (auto const& id : request["ids"]) {
            stopped = writer.push(id);
            text += writer.take();
            ++read;
            if (stopped) break;
        }
        return {text + writer.finish(), stopped, read};
    }
    std::vector<gsx::Message> messages;
    for (json const& message : request.at("chat")) messages.push_back({message.at("role"), message.at("content")});
    gsx::ChatTemplate const chat(bundle, tokenizer);
    return {chat.render(messages), chat.prompt(messages), chat.stopIds()};
}

}  // namespace

int main(int count, char** arguments) {
    if (count != 2) {
        std::cerr << "usage: gsx_text_of BUNDLE\n";
        return 2;
    }
    try {
        gsx::Bundle const bundle = gsx::openBundle(arguments[1]);
        gsx::Tokenizer const tokenizer(bundle);
        for (std::string line; std::getline(std::cin, line);) {
            json found;
            try {
                found = answer(bundle, tokenizer, json::parse(line));
            } catch (gsx::Error const& error) {
                found = {{"error", error.what()}};
            }
            std::cout << found << std::endl;
        }
    } catch (std::exception const& error) {
        std::cout << error.what() << std::endl;
        return 1;
    }
    return 0;
}
