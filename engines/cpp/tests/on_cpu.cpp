// Generates with a bundle on ONNX Runtime: `gsx_on_cpu BUNDLE`. It reads lines of JSON, cases as in `generation.json`
// (`draft`, `prompts`, `options`), and answers each with a line: `{"sequences": ..., "stats": ...}`, or `{"error": ...}`.

#include <iostream>
#include <nlohmann/json.hpp>
#include <string>

#include "comparison.h"
#include "gsx/onnxruntime.h"

namespace {

using nlohmann::json;

json answer(std::string const& bundle, json const& one) {
    gsx::Model model = gsx::openModelOnCpu(bundle, draftingOf(one), {1});
    gsx::Generation const made =
        model.generate(one.at("prompts").get<std::vector<gsx::Tokens>>(), optionsOf(one.at("options")));
    json sequences = json::array();
    for (gsx::Generated const& sequence : made.sequences) {
        json logprobs = json::array();
        for (gsx::TokenLogprobs const& token : sequence.logprobs) logprobs.push_back({token.logprob, token.top});
        sequences.push_back({{"tokens", sequence.tokens}, {"finish", gsx::nameOf(sequence.finish)}, {"logprobs", logprobs}});
    }
    gsx::GenerationStats const& stats = made.stats;
    return {{"sequences", sequences},
            {"stats",
             {{"decode_steps", stats.decodeSteps},
              {"drafted", stats.drafted},
              {"accepted", stats.accepted},
              {"kept_rows", stats.keptRows},
              {"gated_rows", stats.gatedRows}}}};
}

}  // namespace

int main(int count, char** arguments) {
    if (count != 2) {
        std::cerr << "usage: gsx_on_cpu BUNDLE\n";
        return 2;
    }
    for (std::string line; std::getline(std::cin, line);) {
        json found;
        try {
            found = answer(arguments[1], json::parse(line));
        } catch (std::exception const& error) {
            found = {{"error", error.what()}};
        }
        std::cout << found << std::endl;
    }
    return 0;
}
