#include "command.h"

#include <charconv>
#include <functional>
#include <iostream>
#include <istream>
#include <map>
#include <string_view>

#include "gsx/error.h"
#if GSX_HAS_TENSORRT
#include "gsx/tensorrt.h"
#endif
#if GSX_HAS_ONNXRUNTIME
#include "gsx/onnxruntime.h"
#endif

char const* const kHelp = R"(Usage: gsx-run BUNDLE [PROMPT] [OPTIONS]
       gsx-run BUNDLE [OPTIONS] < IDS
       gsx-run BUNDLE --chat [OPTIONS]

Continue a prompt with a bundle, on the runtime that this program was built for. The new text is written to standard output
as it comes. Without PROMPT token ids are read from standard input, separated by white space, and new ids are written, one per
line.

  --chat               answer messages, one on each line, by the bundle's chat template; Ctrl-C ends an answer, Ctrl-D the chat
  --max-new-tokens N   maximum number of new tokens (128)
  --stop TEXT          a text that ends the generation, and is left out; more than once for several
  --budget B           share of skippable work to keep; default: as exported
  --layers SET         branches that run, e.g. 0-3,6,8.attn (--policy layers)
  --exit N             run the first N layers (--policy layers)
  --speedup X          Unified Layer Skipping: new tokens run 1/X of the layers (--policy layers)
  --exit-threshold C   confidence at which a token exits; inf: no token exits (--policy calm)
  --loops N            how many loops of a looped model run (--policy loops)
  --hold               move the thresholds of new tokens so that the budget holds on this text
  --temperature T      0 is greedy (0)
  --top-k K            only the K likeliest tokens; 0 for all (0)
  --top-p P            only the likeliest tokens that together reach this probability (1)
  --seed S             seed of the random numbers; default: a new one each time
  --min-p P            only tokens at least this share as likely as the likeliest one; 0 for all (0)
  --repetition-penalty X  divides the logits of tokens that are in the text, prompt included; 1 for none (1)
  --frequency-penalty X   taken off a token's logit for each time that it is in the new text (0)
  --presence-penalty X    taken off a token's logit if it is in the new text (0)
  --logit-bias LIST    added to the logits of tokens, e.g. 11:-100,2:1.5
  --logprobs N         with --json: each token's log-probability, and those of the N likeliest
  --draft DRAFT        use another draft than the bundle's: exit:E, budget:B or layers:SET
  --draft-length N     tokens drafted before a verification; default: found while generating
  --no-speculative     plain decoding, even if the bundle has a draft
  --backend NAME       onnxruntime (a CPU), tensorrt or tensorrt-rtx; default: an engine's, if this program was built for one
  --threads N          with onnxruntime: threads within an op; default: ONNX Runtime's own choice
  --plugins FILE       with engines: the plugin library that they were built with
  --json               print ids and statistics as one line of JSON at the end, like `gsx generate --json`
  --help               show this help

  gsx-run out/my-model "def main(" --budget 0.5
  echo 1 15 20 | gsx-run out/my-model --temperature 0.8 --seed 1
)";

// The runtimes that this program was built for; the first is the default.
std::vector<std::string> backends() {
    std::vector<std::string> names;
#if GSX_HAS_TENSORRT
    names.emplace_back(gsx::backendName());
#endif
#if GSX_HAS_ONNXRUNTIME
    names.emplace_back("onnxruntime");
#endif
    return names;
}

namespace {

template <typename T>
T numberOf(std::string_view text, std::string const& name, char const* expected) {
    T number{};
    auto const [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
    if (error != std::errc() || end != text.data() + text.size()) {
        throw gsx::UsageError(name, {expected, "'" + std::string(text) + "'", {}});
    }
    return number;
}

// Biases such as `11:-100,2:1.5`.
std::map<int64_t, double> biasesOf(std::string_view text, std::string const& name) {
    std::map<int64_t, double> biases;
    while (true) {
        std::string_view const part = text.substr(0, text.find(','));
        size_t const colon = part.find(':');
        if (colon == std::string_view::npos) {
            throw gsx::UsageError(name, {"biases such as 11:-100,2:1.5", "'" + std::string(part) + "'", {}});
        }
        auto const token = numberOf<int64_t>(part.substr(0, colon), name, "a token's id before ':'");
        biases[token] = numberOf<double>(part.substr(colon + 1), name, "a number behind ':'");
        if (part.size() == text.size()) return biases;
        text.remove_prefix(part.size() + 1);
    }
}

}  // namespace

Command parse(int count, char** arguments) {
    Command command;
    command.backend = backends().front();
    gsx::Options& options = command.options;
    std::string name;
    std::string value;
    auto const whole = [&] { return numberOf<int64_t>(value, name, "a whole number"); };
    auto const real = [&] { return numberOf<double>(value, name, "a number"); };
    std::map<std::string, std::function<void()>> const withValue = {
        {"--max-new-tokens", [&] { options.maxNewTokens = whole(); }},
        {"--stop", [&] { command.stops.push_back(value); }},
        {"--budget", [&] { command.keep.budget = real(); }},
        {"--layers", [&] { command.keep.layers = value; }},
        {"--exit", [&] { command.keep.exit = whole(); }},
        {"--speedup", [&] { command.keep.speedup = real(); }},
        {"--exit-threshold", [&] { command.keep.exitThreshold = real(); }},
        {"--loops", [&] { command.keep.loops = whole(); }},
        {"--temperature", [&] { options.sampling.temperature = real(); }},
        {"--top-k", [&] { options.sampling.topK = whole(); }},
        {"--top-p", [&] { options.sampling.topP = real(); }},
        {"--seed", [&] { options.sampling.seed = numberOf<uint64_t>(value, name, "a whole number of at least 0"); }},
        {"--min-p", [&] { options.sampling.minP = real(); }},
        {"--repetition-penalty", [&] { options.sampling.repetitionPenalty = real(); }},
        {"--frequency-penalty", [&] { options.sampling.frequencyPenalty = real(); }},
        {"--presence-penalty", [&] { options.sampling.presencePenalty = real(); }},
        {"--logit-bias", [&] { options.sampling.logitBias = biasesOf(value, name); }},
        {"--logprobs", [&] { options.logprobs = whole(); }},
        {"--draft", [&] { command.drafting.draft = value; }},
        {"--draft-length", [&] { options.draftLength = whole(); }},
        {"--backend", [&] { command.backend = value; }},
        {"--threads", [&] { command.threads = numberOf<int>(value, name, "a whole number"); }},
        {"--plugins", [&] { command.plugins = value; }},
    };
    std::map<std::string, std::function<void()>> const flags = {
        {"--hold", [&] { command.keep.hold = true; }},
        {"--no-speculative", [&] { command.drafting.speculative = false; }},
        {"--json", [&] { command.json = true; }},
        {"--chat", [&] { command.chat = true; }},
        {"--help", [&] { command.help = true; }},
    };
    for (int i = 1; i < count; ++i) {
        name = arguments[i];
        if (auto const option = flags.find(name); option != flags.end()) {
            option->second();
        } else if (auto const setter = withValue.find(name); setter != withValue.end()) {
            if (i + 1 == count) throw gsx::UsageError(name, {"a value", "none", "gsx-run --help"});
            value = arguments[++i];
            setter->second();
        } else if (name.substr(0, 2) == "--" || command.prompt) {
            throw gsx::UsageError("'" + name + "' is not an option", {{}, {}, "gsx-run --help"});
        } else if (command.bundle.empty()) {
            command.bundle = name;
        } else {
            command.prompt = name;
        }
    }
    if (command.chat && (command.prompt || command.json)) {
        throw gsx::UsageError("--chat reads messages from standard input", {{}, command.prompt ? "a prompt" : "--json", {}});
    }
    if (!command.stops.empty() && !command.prompt && !command.chat) {
        throw gsx::UsageError("--stop", {"a prompt, or --chat", "token ids on standard input", {}});
    }
    if (command.bundle.empty() && !command.help) {
        throw gsx::UsageError("no bundle was named", {"gsx-run BUNDLE", {}, "gsx-run --help"});
    }
    return command;
}

gsx::Model open(Command const& command) {
#if GSX_HAS_TENSORRT
    if (command.backend == gsx::backendName()) {
        gsx::GpuOptions options;
        if (command.plugins) options.pluginLibrary = *command.plugins;
        options.onWarning = [](std::string const& text) { std::cerr << "gsx-run: " << text << "\n"; };
        return gsx::openModel(command.bundle, command.drafting, options);
    }
#endif
#if GSX_HAS_ONNXRUNTIME
    if (command.backend == "onnxruntime") return gsx::openModelOnCpu(command.bundle, command.drafting, {command.threads});
#endif
    std::string known;
    for (std::string const& name : backends()) known += (known.empty() ? "" : " or ") + name;
    throw gsx::UsageError("--backend", {known, "'" + command.backend + "'", "build gsx-run for it (docs/cpp.md)"});
}

gsx::Tokens parseIds(std::istream& stream) {
    gsx::Tokens ids;
    for (std::string word; stream >> word;) ids.push_back(numberOf<int64_t>(word, "the prompt", "token ids"));
    return ids;
}
