// The TensorRT side of gsx on the stand-in, from `openModel` on:
//   gsx_standin vectors GENERATION.json BUNDLES [SETTING...]
//       repeats the vectors, whose models are in the folder BUNDLES
//   gsx_standin failures GENERATION.json BUNDLES CASE
//       repeats one case with several prompts, and makes each call of CUDA and TensorRT fail in turn; afterwards the same
//       model must still work
//   gsx_standin deaths GENERATION.json BUNDLES CASE
//       the same, but the GPU is lost at each call in turn: every later call must say so, and everything is freed
//   gsx_standin generate BUNDLE [SETTING...]
//       one generation from a fixed prompt: prints its tokens, or the error
// A setting is NAME=VALUE: graphs=0, plugins=FILE, or one of standin.h: devices, major, records, reuse, failing.
// Exit code 1 for a difference, or an error of gsx.

#include <functional>
#include <iostream>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "comparison.h"
#include "gsx/gsx.h"
#include "gsx/tensorrt.h"
#include "standin.h"

using nlohmann::json;

namespace {

gsx::GpuOptions settingsOf(std::vector<std::string> const& settings) {
    gsx::GpuOptions options;
    options.onWarning = [](std::string const& text) { std::cout << "warning: " << text << "\n"; };
    std::map<std::string, std::function<void(std::string const&)>> const known = {
        {"graphs", [&](std::string const& value) { options.cudaGraphs = value != "0"; }},
        {"plugins", [&](std::string const& value) { options.pluginLibrary = value; }},
        {"devices", [](std::string const& value) { standin::machine().devices = std::stoi(value); }},
        {"major", [](std::string const& value) { standin::machine().major = std::stoi(value); }},
        {"records", [](std::string const& value) { standin::machine().records = value != "0"; }},
        {"reuse", [](std::string const& value) { standin::machine().reusesAddresses = value != "0"; }},
        {"failing", [](std::string const& value) { standin::failAlways(value); }},
    };
    for (std::string const& setting : settings) {
        size_t const equals = setting.find('=');
        known.at(setting.substr(0, equals))(setting.substr(equals + 1));
    }
    return options;
}

void compareLeftovers(std::string const& when) {
    compare(when + ": misuse", standin::takeMisuse(), json::array());
    compare(when + ": objects that were not freed", standin::alive(), 0);
}

void repeatVectors(json const& file, std::string const& bundles, gsx::GpuOptions const& options) {
    auto const open = [&](std::string const& name, json const&, gsx::Drafting const& drafting) {
        compareLeftovers("before " + name);
        return gsx::openModel(bundles + "/" + name, drafting, options);
    };
    repeatGeneration(file, {open, standin::takeCalls});
    compareLeftovers("at the end");
    compare("CUDA graphs were launched", standin::graphLaunches() > 0, options.cudaGraphs);
}

class Failing {
public:
    Failing(json const& one, std::string const& bundles)
        : mCase(one), mDirectory(bundles + "/" + one.at("model").get<std::string>()) {}

    void eachInTurn() {
        int64_t const before = standin::calls();
        {
            gsx::Model model = open();
            compare("without a failure", generate(model), mCase.at("sequences"));
        }
        int64_t const all = standin::calls() - before;
        for (int64_t number = 1; number <= all; ++number) fail(number);
    }

    // From the first generation's calls on; before, a program has no model yet.
    void dieAtEach() {
        int64_t calls = 0;
        {
            gsx::Model model = open();
            int64_t const before = standin::calls();
            generate(model);
            calls = standin::calls() - before;
        }
        compare("blocks of scratch memory", standin::scratchBlocks(), 1);
        for (int64_t number = 1; number <= calls; ++number) die(number);
    }

private:
    void die(int64_t number) {
        std::string const when = "the GPU was lost at call " + std::to_string(number);
        {
            gsx::Model model = open();
            standin::dieAt(standin::calls() + number);
            for (int i = 0; i < 2; ++i) {
                std::string said = "no error";
                try {
                    generate(model);
                } catch (gsx::LostGpuError const& error) {
                    said = "lost";
                } catch (gsx::Error const& error) {
                    said = error.what();
                }
                compare(when, said, "lost");
            }
        }
        standin::revive();
        compareLeftovers(when);
    }

    void fail(int64_t number) {
        {
            std::optional<gsx::Model> model;
            standin::failAt(standin::calls() + number);
            try {
                model.emplace(open());
                // A failed recording is no error: the call runs without it.
                compare(standin::takeFailed() + " failed", generate(*model), mCase.at("sequences"));
            } catch (gsx::EngineError const&) {
                // The expected way to fail.
            }
            standin::failAt(0);
            std::string const when = "after " + standin::takeFailed() + " failed as call " + std::to_string(number);
            try {
                if (!model) model.emplace(open());
                compare(when, generate(*model), mCase.at("sequences"));
            } catch (gsx::EngineError const& error) {
                compare(when, error.what(), "a generation");
            }
        }
        compareLeftovers("after failed call " + std::to_string(number));
    }

    gsx::Model open() const { return gsx::openModel(mDirectory, draftingOf(mCase)); }

    json generate(gsx::Model& model) const {
        json made = json::array();
        auto const prompts = mCase.at("prompts").get<std::vector<gsx::Tokens>>();
        for (gsx::Generated const& one : model.generate(prompts, optionsOf(mCase.at("options"))).sequences) {
            made.push_back({{"tokens", one.tokens}, {"finish", gsx::nameOf(one.finish)}});
        }
        return made;
    }

    json const& mCase;
    std::string mDirectory;
};

void repeatFailures(json const& file, std::string const& bundles, std::string const& name, bool deaths) {
    for (json const& one : file.at("cases")) {
        if (one.value("name", "") != name || one.at("prompts").size() < 2) continue;
        Failing failing(one, bundles);
        return deaths ? failing.dieAtEach() : failing.eachInTurn();
    }
}

int generateOnce(std::string const& bundle, gsx::GpuOptions const& options) {
    try {
        gsx::Model model = gsx::openModel(bundle, {}, options);
        gsx::Options asked;
        asked.maxNewTokens = 24;
        json const tokens = model.generate({{5, 60, 61, 7, 8, 9}}, asked).sequences[0].tokens;
        std::cout << tokens.dump() << "\n" << standin::graphLaunches() << " launches of CUDA graphs\n";
    } catch (gsx::Error const& error) {
        std::cout << error.what() << "\n";
        return 1;
    }
    std::vector<std::string> const misuse = standin::takeMisuse();
    for (std::string const& text : misuse) std::cout << "misuse: " << text << "\n";
    return misuse.empty() ? 0 : 1;
}

}  // namespace

int main(int count, char** arguments) {
    std::vector<std::string> const words(arguments + 1, arguments + count);
    if (words.size() >= 2 && words[0] == "generate") {
        return generateOnce(words[1], settingsOf({words.begin() + 2, words.end()}));
    }
    if (words.size() >= 3 && words[0] == "vectors") {
        gsx::GpuOptions const options = settingsOf({words.begin() + 3, words.end()});
        return compareFile(words[1], {{"generation.json", [&](json const& file) {
                                           repeatVectors(file, words[2], options);
                                       }}});
    }
    if (words.size() == 4 && (words[0] == "failures" || words[0] == "deaths")) {
        return compareFile(words[1], {{"generation.json", [&](json const& file) {
                                           repeatFailures(file, words[2], words[3], words[0] == "deaths");
                                       }}});
    }
    std::cerr << "usage: gsx_standin vectors|failures|deaths|generate ...\n";
    return 2;
}
