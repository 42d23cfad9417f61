// Repeats what Python wrote into a file of vectors (tests/vectors/make.py): `gsx_vectors FILE.json`.
// Prints one line for each difference; exit code 1 where there is one, or where a file had nothing to compare.

#include <cmath>
#include <cstring>
#include <fstream>
#include <functional>
#include <iostream>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <string>

#include "draft_length.h"
#include "gsx/gsx.h"
#include "manifest_json.h"
#include "picker.h"
#include "toy_engine.h"

namespace {

using nlohmann::json;

int gCompared = 0;
int gDifferent = 0;

void compare(std::string const& what, json const& found, json const& wanted) {
    ++gCompared;
    if (found == wanted) return;
    ++gDifferent;
    std::cout << what << ": found " << found.dump() << ", Python has " << wanted.dump() << "\n";
}

double number(json const& text) {
    uint64_t const bits = std::stoull(text.get<std::string>(), nullptr, 16);
    double value = 0;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// What an action is refused with.
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
    if (options.contains("seed")) sampling.seed = options["seed"].get<uint64_t>();
    return sampling;
}

// Logits of a kind: the tables KINDS and REFUSED_KINDS of make.py.
std::vector<float> kindLogits(std::string const& kind, uint32_t seed) {
    struct Kind {
        uint32_t size;
        std::function<double(uint32_t)> logit;
    };
    constexpr double infinity = std::numeric_limits<double>::infinity();
    auto const otherwise = [](uint32_t bits, double third) { return bits % 3 == 0 ? third : bits % 4; };
    auto const centred = [](uint32_t bits) { return static_cast<double>(bits) - 0x1p23; };
    static std::map<std::string, Kind> const kinds = {
        {"one", {1, [](uint32_t bits) { return bits * 0x1p-20; }}},
        {"ties", {64, [](uint32_t bits) { return bits % 4; }}},
        {"all equal", {300, [](uint32_t) { return -3.5; }}},
        {"wide", {1000, [&](uint32_t bits) { return centred(bits) * 0x1p-17; }}},
        {"close", {1000, [&](uint32_t bits) { return centred(bits) * 0x1p-23; }}},
        {"one ruled out", {20, [&](uint32_t bits) { return otherwise(bits, -infinity); }}},
        {"some are no numbers", {20, [&](uint32_t bits) { return otherwise(bits, std::nan("")); }}},
        {"some are infinite", {20, [&](uint32_t bits) { return otherwise(bits, infinity); }}},
        {"all ruled out", {20, [](uint32_t) { return -infinity; }}},
    };
    std::vector<float> logits;
    Kind const& one = kinds.at(kind);
    for (uint32_t v = 0; v < one.size; ++v) logits.push_back(static_cast<float>(one.logit(mix({seed, v}) >> 8)));
    return logits;
}

void repeatSampling(json const& cases) {
    for (json const& one : cases) {
        gsx::Sampling const sampling = samplingOf(one.at("sampling"));
        std::vector<float> const logits = kindLogits(one.at("kind"), one.at("logits_seed"));
        gsx::LogitsRow const row{logits.data(), logits.size()};
        std::string const what = one.at("kind").get<std::string>() + " " + one.at("sampling").dump();
        if (one.contains("error")) {
            compare(what, refusalOf([&] { gsx::Picker(sampling).pick(row, 0, 0); }), one["error"]);
            continue;
        }
        if (!sampling.greedy()) {
            gsx::Candidates const found = gsx::candidatesOf(row, sampling);
            auto const likely = std::count_if(found.weights.begin(), found.weights.end(), [](double w) { return w > 0; });
            compare(what + " candidates", likely, one.at("candidates"));
        }
        for (json const& pick : one.at("picks")) {
            compare(what + " " + pick.dump(), gsx::Picker(sampling).pick(row, pick[0], pick[1]), pick[2]);
        }
    }
}

void repeatDraftLength(json const& cases) {
    for (json const& one : cases) {
        gsx::AdaptiveLength rule(one.at("first"));
        for (json const& round : one.at("rounds")) {
            compare("next", rule.next(), round.at("next"));
            double const chance = number(round.at("chance"));
            json goesOn = json::array();
            for (int64_t const drafted : {1, 2, 5}) {
                goesOn.push_back(rule.goesOn(drafted, std::pow(chance, static_cast<double>(drafted))));
            }
            compare("goes on", goesOn, round.at("goes_on"));
            int64_t const length = round.at("length");
            int64_t const accepted = round.at("accepted");
            rule.learn({length, 1.0 + static_cast<double>(accepted), accepted, round.at("rejected"),
                        static_cast<double>(length) * 0.625, number(round.at("seconds")[0]),
                        number(round.at("seconds")[1])});
            compare("acceptance", rule.acceptance(), number(round.at("acceptance")));
        }
    }
}

void repeatThresholds(json const& file) {
    gsx::Manifest const manifest = gsx::parseManifest(file.at("manifest").dump(), "vectors");
    for (json const& one : file.at("budgets")) {
        json bits = json::array();
        for (auto const& layer : manifest.selection->thresholdsFor(number(one.at("budget")))) {
            for (float const threshold : layer) {
                uint32_t value = 0;
                std::memcpy(&value, &threshold, sizeof value);
                bits.push_back(value);
            }
        }
        compare("thresholds", bits, one.at("bits"));
    }
}

gsx::Keep keepOf(json const& raw) {
    gsx::Keep keep;
    if (raw.contains("budget")) keep.budget = raw["budget"].get<double>();
    if (raw.contains("layers")) keep.layers = raw["layers"].get<std::string>();
    if (raw.contains("exit")) keep.exit = raw["exit"].get<int64_t>();
    if (raw.contains("speedup")) keep.speedup = raw["speedup"].get<double>();
    if (raw.contains("exit_threshold")) keep.exitThreshold = std::stod(raw["exit_threshold"].get<std::string>());
    return keep;
}

gsx::Options optionsOf(json const& raw) {
    gsx::Options options;
    options.maxNewTokens = raw.at("max_new_tokens");
    options.sampling = samplingOf(raw.at("sampling"));
    json const& keep = raw.at("keep");
    for (json const& one : keep.is_array() ? keep : json::array({keep})) options.keep.push_back(keepOf(one));
    if (!raw.at("stop_ids").is_null()) options.stopIds = raw["stop_ids"].get<gsx::Tokens>();
    if (!raw.at("draft_length").is_null()) options.draftLength = raw["draft_length"].get<int64_t>();
    return options;
}

// Generate with the toy; returns the hash of its calls.
std::string generateToy(json const& raw, json const& one, gsx::Options const& options, gsx::Generation& made) {
    gsx::Manifest const manifest = gsx::parseManifest(raw.dump(), "vectors");
    bool const copies = raw.at("kv_policy") == "copy";
    gsx::Drafting drafting{!one.at("draft").is_null(), {}};
    if (drafting.speculative) drafting.draft = one["draft"].get<std::string>();
    gsx::Sha256 digest;
    auto const engine = [&](std::string const& graph) {
        return std::make_unique<ToyEngine>(manifest, graph, copies, digest);
    };
    gsx::Model model({"toy", manifest}, manifest.engines.at("toy"), engine, drafting);
    made = model.generate(one.at("prompts").get<std::vector<gsx::Tokens>>(), options);
    return digest.finish();
}

void repeatRefusal(json const& raw, json const& one, gsx::Options const& options) {
    gsx::Generation made;
    compare("refusal", refusalOf([&] { generateToy(raw, one, options, made); }), one.at("error"));
}

void repeatGeneration(json const& file) {
    for (json const& one : file.at("cases")) {
        json const& raw = file.at("manifests").at(one.at("model").get<std::string>());
        gsx::Options options = optionsOf(one.at("options"));
        if (one.contains("error")) {
            repeatRefusal(raw, one, options);
            continue;
        }
        std::string const name = one.at("name");
        std::vector<gsx::Tokens> streamed(one.at("prompts").size());
        options.onToken = [&](size_t sequence, int64_t token) {
            streamed[sequence].push_back(token);
            return false;
        };
        gsx::Generation made;
        std::string const calls = generateToy(raw, one, options, made);
        json sequences = json::array();
        for (size_t i = 0; i < made.sequences.size(); ++i) {
            gsx::Generated const& sequence = made.sequences[i];
            sequences.push_back({{"tokens", sequence.tokens}, {"finish", gsx::nameOf(sequence.finish)}});
            compare(name + ": streamed", streamed[i], sequence.tokens);
        }
        compare(name + ": sequences", sequences, one.at("sequences"));
        gsx::GenerationStats const& stats = made.stats;
        json const counters = {{"prompt_tokens", stats.promptTokens}, {"new_tokens", stats.newTokens},
                               {"sequences", stats.sequences},        {"decode_steps", stats.decodeSteps},
                               {"drafted", stats.drafted},            {"accepted", stats.accepted},
                               {"kept_rows", stats.keptRows},         {"gated_rows", stats.gatedRows}};
        compare(name + ": stats", counters, one.at("stats"));
        compare(name + ": calls", calls, one.at("calls_sha256"));
        // How far to draft is then found by the clock, which may change the calls and never the text.
        if (!one.at("draft").is_null()) {
            options.draftLength.reset();
            options.onToken = nullptr;
            generateToy(raw, one, options, made);
            for (size_t i = 0; i < made.sequences.size(); ++i) {
                compare(name + ": adaptive", made.sequences[i].tokens, one.at("sequences")[i].at("tokens"));
            }
        }
    }
}

}  // namespace

int main(int count, char** arguments) {
    if (count != 2) {
        std::cerr << "usage: gsx_vectors FILE.json\n";
        return 2;
    }
    std::string const path = arguments[1];
    std::map<std::string, std::function<void(json const&)>> const kinds = {{"sampling.json", repeatSampling},
                                                                         {"draft_length.json", repeatDraftLength},
                                                                         {"thresholds.json", repeatThresholds},
                                                                         {"generation.json", repeatGeneration}};
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
