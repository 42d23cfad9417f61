// Generates with a bundle whose engines run in the process that started this one: `gsx_piped BUNDLE ENGINES`. So the whole
// decoding of C++ runs on the logits of a real model, on a machine without a GPU.
//
// It reads and writes lines of JSON. A request is `{"prompt": ids, "max_new_tokens": n}`, its answer
// `{"ids": ids, "finish": reason}`. In between the engines are called: `{"buffer": number, "name": ..., "shape": ...}`
// makes K/V memory and has no answer; `{"profile": ..., "feeds": ..., "buffers": {name: [number, row,
// shape]}, "results": {name: shape}}` is one call, answered by its results. An array is `{"type": "float32" or "int64", "shape": ..., "data": ...}`.

#include <iostream>
#include <nlohmann/json.hpp>
#include <string>

#include "gsx/bundle.h"
#include "gsx/model.h"

namespace {

using nlohmann::json;

struct PipedBuffer final : gsx::Buffer {
    explicit PipedBuffer(size_t ofNumber) : number(ofNumber) {}
    size_t number;
};

json written(gsx::Value const& value) {
    return std::visit(
        [&](auto const& array) {
            char const* type = std::holds_alternative<gsx::Array<float>>(value) ? "float32" : "int64";
            return json{{"type", type}, {"shape", array.shape}, {"data", array.data}};
        },
        value);
}

gsx::Value valueOf(json const& raw) {
    auto const shape = raw.at("shape").get<gsx::Shape>();
    if (raw.at("type") == "int64") return gsx::Array<int64_t>(shape, raw.at("data").get<std::vector<int64_t>>());
    return gsx::Array<float>(shape, raw.at("data").get<std::vector<float>>());
}

json readLine() {
    std::string line;
    if (!std::getline(std::cin, line)) throw std::runtime_error("the other process ended");
    return json::parse(line);
}

class PipedEngine final : public gsx::Engine {
public:
    std::shared_ptr<gsx::Buffer> buffer(gsx::Shape const& shape, std::string const& name) override {
        std::cout << json{{"buffer", mBuffers}, {"name", name}, {"shape", shape}} << std::endl;
        return std::make_shared<PipedBuffer>(mBuffers++);
    }

    gsx::Values run(size_t profile, gsx::Values const& feeds, gsx::SharedBuffers const& buffers,
                    std::map<std::string, gsx::Shape> const& results) override {
        json call = {{"profile", profile}, {"results", results}, {"feeds", json::object()}, {"buffers", json::object()}};
        for (auto const& [name, value] : feeds) call["feeds"][name] = written(value);
        for (auto const& [name, bound] : *buffers) {
            call["buffers"][name] = {static_cast<PipedBuffer const&>(*bound.buffer).number, bound.row, bound.shape};
        }
        std::cout << call << std::endl;
        json const answer = readLine();
        gsx::Values found;
        for (auto const& [name, value] : answer.items()) found.emplace(name, valueOf(value));
        return found;
    }

private:
    size_t mBuffers = 0;
};

}  // namespace

int main(int count, char** arguments) {
    if (count != 3) {
        std::cerr << "usage: gsx_piped BUNDLE ENGINES\n";
        return 2;
    }
    try {
        gsx::Bundle bundle = gsx::openBundle(arguments[1]);
        gsx::EngineEntry const entry = bundle.manifest.engines.at(arguments[2]);
        auto const engine = [](std::string const&) { return std::make_unique<PipedEngine>(); };
        gsx::Model model(std::move(bundle), entry, engine, {false, {}});
        for (std::string line; std::getline(std::cin, line);) {
            json const request = json::parse(line);
            gsx::Options options;
            options.maxNewTokens = request.at("max_new_tokens");
            gsx::Generation const made = model.generate({request.at("prompt").get<gsx::Tokens>()}, options);
            gsx::Generated const& one = made.sequences[0];
            std::cout << json{{"ids", one.tokens}, {"finish", gsx::nameOf(one.finish)}} << std::endl;
        }
    } catch (std::exception const& error) {
        std::cerr << error.what() << "\n";
        return 1;
    }
    return 0;
}
