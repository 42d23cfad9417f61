// Repeats what Python wrote into a file of vectors (tests/vectors/make.py): `gsx_vectors FILE.json`.
// Prints one line for each difference; exit code 1 if there is one, or if the file had nothing to compare.

#include <cmath>
#include <cstring>
#include <functional>
#include <iostream>
#include <limits>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>

#include "comparison.h"
#include "draft_length.h"
#include "hold.h"
#include "manifest_json.h"
#include "picker.h"
#include "toy_engine.h"

namespace {

using nlohmann::json;

double number(json const& text) {
    uint64_t const bits = std::stoull(text.get<std::string>(), nullptr, 16);
    double value = 0;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Logits of a given kind: the tables KINDS and REFUSED_KINDS of make.py.
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

uint32_t bitsOf(float value) {
    uint32_t bits = 0;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

// The tokens are equal; the logarithms nearly, since exp and log may differ in the last bit.
void compareLogprobs(std::string const& what, gsx::TokenLogprobs const& found, json const& wanted) {
    auto const compareOne = [&](double one, json const& other) {
        double const expected = number(other);
        compare(what + " log-probability", one == expected || std::abs(one - expected) < 1e-12, true);
    };
    compareOne(found.logprob, wanted.at("logprob"));
    compare(what + " likeliest", found.top.size(), wanted.at("top").size());
    for (size_t i = 0; i < found.top.size(); ++i) {
        compare(what + " likeliest", found.top[i].first, wanted["top"][i][0]);
        compareOne(found.top[i].second, wanted["top"][i][1]);
    }
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
        if (one.contains("text")) {
            auto const [prompt, fresh] = one["text"].get<std::pair<gsx::Tokens, gsx::Tokens>>();
            std::vector<float> const changed = gsx::adjusted(row, sampling, prompt, fresh);
            json bits = json::array();
            for (float const value : changed) bits.push_back(bitsOf(value));
            compare(what + " adjusted", bits, one.at("adjusted"));
            continue;
        }
        compareLogprobs(what, gsx::logprobsOf(row, 0, one.at("logprobs").at("top").size()), one.at("logprobs"));
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
                bits.push_back(bitsOf(threshold));
            }
        }
        compare("thresholds", bits, one.at("bits"));
    }
}

void repeatHold(json const& file) {
    gsx::Manifest const manifest = gsx::parseManifest(file.at("manifest").dump(), "vectors");
    for (json const& one : file.at("sequences")) {
        gsx::Hold hold(*manifest.selection, number(one.at("budget")), one.at("branches"));
        json settings = json::array();
        for (int64_t const kept : one.at("kept")) {
            if (hold.read(kept)) settings.push_back(hold.setting());
        }
        compare("settings held", settings, one.at("settings"));
    }
}

// The toy model behind the engine interface: only decoding, without a runtime.
EnginesUnderTest toyEngines() {
    struct Toys {
        std::map<std::string, gsx::Manifest> manifests;
        gsx::Sha256 digest;
    };
    auto const toys = std::make_shared<Toys>();
    auto const open = [toys](std::string const& name, json const& raw, gsx::Drafting const& drafting) {
        gsx::Manifest const& manifest =
            toys->manifests.try_emplace(name, gsx::parseManifest(raw.dump(), "vectors")).first->second;
        auto const engine = [&](std::string const& graph) {
            return std::make_unique<ToyEngine>(manifest, graph, toys->digest);
        };
        std::vector<gsx::Model::Engines> steps;
        for (auto const& [set, entry] : manifest.engines) {
            if (entry.kvLayout == gsx::kStepLayout) steps.push_back({entry, engine});
        }
        return gsx::Model({"toy", manifest}, manifest.engines.at("toy"), engine, drafting, steps);
    };
    return {open, [toys] { return std::exchange(toys->digest, {}).finish(); }};
}

}  // namespace

int main(int count, char** arguments) {
    if (count != 2) {
        std::cerr << "usage: gsx_vectors FILE.json\n";
        return 2;
    }
    return compareFile(arguments[1], {{"sampling.json", repeatSampling},
                                      {"draft_length.json", repeatDraftLength},
                                      {"thresholds.json", repeatThresholds},
                                      {"hold.json", repeatHold},
                                      {"generation.json", [](json const& file) { repeatGeneration(file, toyEngines()); }}});
}
