#include "comparison.h"

#include <fstream>
#include <iostream>

#include "gsx/error.h"

using nlohmann::json;

namespace {

int gCompared = 0;
int gDifferent = 0;

gsx::Keep keepOf(json const& raw) {
    gsx::Keep keep;
    if (raw.contains("budget")) keep.budget = raw["budget"].get<double>();
    if (raw.contains("layers")) keep.layers = raw["layers"].get<std::string>();
    if (raw.contains("exit")) keep.exit = raw["exit"].get<int64_t>();
    if (raw.contains("speedup")) keep.speedup = raw["speedup"].get<double>();
    if (raw.contains("exit_threshold")) keep.exitThreshold = std::stod(raw["exit_threshold"].get<std::string>());
    if (raw.contains("loops")) keep.loops = raw["loops"].get<int64_t>();
    keep.hold = raw.value("hold", false);
    return keep;
}

void repeatCase(json const& one, json const& manifest, gsx::Options options, EnginesUnderTest const& engines) {
    std::string const name = one.at("name");
    auto const prompts = one.at("prompts").get<std::vector<gsx::Tokens>>();
    std::vector<gsx::Tokens> streamed(prompts.size());
    options.onToken = [&](size_t sequence, int64_t token) {
        streamed[sequence].push_back(token);
        return false;
    };
    gsx::Model model = engines.open(one.at("model"), manifest, draftingOf(one));
    gsx::Generation made = model.generate(prompts, options);
    compare(name + ": calls", engines.takeCalls(), one.at("calls_sha256"));
    json sequences = json::array();
    for (size_t i = 0; i < made.sequences.size(); ++i) {
        gsx::Generated const& sequence = made.sequences[i];
        sequences.push_back({{"tokens", sequence.tokens}, {"finish", gsx::nameOf(sequence.finish)}});
        compare(name + ": streamed", streamed[i], sequence.tokens);
        compare(name + ": log-probabilities", sequence.logprobs.size(), options.logprobs ? sequence.tokens.size() : 0);
    }
    compare(name + ": sequences", sequences, one.at("sequences"));
    gsx::GenerationStats const& stats = made.stats;
    json const counters = {{"prompt_tokens", stats.promptTokens}, {"new_tokens", stats.newTokens},
                           {"sequences", stats.sequences},        {"decode_steps", stats.decodeSteps},
                           {"drafted", stats.drafted},            {"accepted", stats.accepted},
                           {"kept_rows", stats.keptRows},         {"gated_rows", stats.gatedRows},
                           {"held_kept_rows", stats.heldKeptRows}, {"held_gated_rows", stats.heldGatedRows}};
    compare(name + ": stats", counters, one.at("stats"));
    // The same model again, with what the first generation left in its engines. The draft length now depends on measured
    // times, which may change the calls but never the text.
    options.draftLength.reset();
    options.onToken = nullptr;
    made = model.generate(prompts, options);
    for (size_t i = 0; i < made.sequences.size(); ++i) {
        compare(name + ": again", made.sequences[i].tokens, one.at("sequences")[i].at("tokens"));
    }
    engines.takeCalls();
}

}  // namespace

void compare(std::string const& what, json const& found, json const& wanted) {
    ++gCompared;
    if (found == wanted) return;
    ++gDifferent;
    std::cout << what << ": found " << found.dump() << ", Python has " << wanted.dump() << "\n";
}

std::string refusalOf(std::function<void()> const& action) {
    try {
        action();
    } catch (gsx::Error const& error) {
        return error.what();
    }
    return "nothing was refused";
}

gsx::Sampling samplingOf(json const& options) {
    gsx::Sampling sampling;
    sampling.temperature = options.at("temperature");
    sampling.topK = options.value("top_k", int64_t{0});
    sampling.topP = options.value("top_p", 1.0);
    sampling.minP = options.value("min_p", 0.0);
    sampling.repetitionPenalty = options.value("repetition_penalty", 1.0);
    sampling.frequencyPenalty = options.value("frequency_penalty", 0.0);
    sampling.presencePenalty = options.value("presence_penalty", 0.0);
    json const biases = options.value("logit_bias", json::object());
    for (auto const& [token, bias] : biases.items()) {
        sampling.logitBias[std::stoll(token)] = bias.get<double>();
    }
    if (options.contains("seed")) sampling.seed = options["seed"].get<uint64_t>();
    return sampling;
}

gsx::Options optionsOf(json const& raw) {
    gsx::Options options;
    options.maxNewTokens = raw.at("max_new_tokens");
    options.sampling = samplingOf(raw.at("sampling"));
    json const& keep = raw.at("keep");
    for (json const& one : keep.is_array() ? keep : json::array({keep})) options.keep.push_back(keepOf(one));
    if (!raw.at("stop_ids").is_null()) options.stopIds = raw["stop_ids"].get<gsx::Tokens>();
    if (raw.contains("logprobs")) options.logprobs = raw["logprobs"].get<int64_t>();
    if (!raw.at("draft_length").is_null()) options.draftLength = raw["draft_length"].get<int64_t>();
    return options;
}

gsx::Drafting draftingOf(json const& one) {
    gsx::Drafting drafting{!one.at("draft").is_null(), {}};
    if (drafting.speculative) drafting.draft = one["draft"].get<std::string>();
    return drafting;
}

void repeatGeneration(json const& file, EnginesUnderTest const& engines) {
    for (json const& one : file.at("cases")) {
        json const& manifest = file.at("manifests").at(one.at("model").get<std::string>());
        gsx::Options const options = optionsOf(one.at("options"));
        if (one.contains("error")) {
            auto const generate = [&] {
                gsx::Model model = engines.open(one.at("model"), manifest, draftingOf(one));
                model.generate(one.at("prompts").get<std::vector<gsx::Tokens>>(), options);
            };
            compare("refusal", refusalOf(generate), one.at("error"));
        } else {
            repeatCase(one, manifest, options, engines);
        }
    }
}

int compareFile(std::string const& path, std::map<std::string, std::function<void(json const&)>> const& kinds) {
    try {
        std::ifstream file(path);
        kinds.at(path.substr(path.rfind('/') + 1))(json::parse(file));
    } catch (std::exception const& error) {
        std::cout << path << ": " << error.what() << "\n";
        return 1;
    }
    std::cout << gCompared << " compared, " << gDifferent << " different\n";
    return gCompared > 0 && gDifferent == 0 ? 0 : 1;
}
