// `gsx-run BUNDLE`: continues a prompt with a bundle's engines, or on a CPU. See docs/cpp.md.

#include <charconv>
#include <functional>
#include <iostream>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "gsx/gsx.h"
#if GSX_HAS_TENSORRT
#include "gsx/tensorrt.h"
#endif
#if GSX_HAS_ONNXRUNTIME
#include "gsx/onnxruntime.h"
#endif

namespace {

constexpr int kUsedWrongly = 2;

constexpr char const* kHelp = R"(Usage: gsx-run BUNDLE [OPTIONS] < IDS

Continue a prompt with a bundle, on the runtime that this program was built for. The prompt is read from standard input as token ids separated by white
space; new ids are written to standard output as they come, one per line.

  --max-new-tokens N   maximum number of new tokens (128)
  --budget B           share of skippable work to keep; default: as exported
  --layers SET         branches that run, e.g. 0-3,6,8.attn (--policy layers)
  --exit N             run the first N layers (--policy layers)
  --speedup X          Unified Layer Skipping: new tokens run 1/X of the layers (--policy layers)
  --exit-threshold C   confidence at which a token exits; inf: no token exits (--policy calm)
  --loops N            how many loops of a looped model run (--policy loops)
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

struct Command {
    std::string bundle;
    gsx::Keep keep;
    gsx::Options options;
    gsx::Drafting drafting;
    std::string backend = backends().front();
    std::optional<int> threads;
    std::optional<std::string> plugins;
    bool json = false;
    bool help = false;
};

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

Command parse(int count, char** arguments) {
    Command command;
    gsx::Options& options = command.options;
    std::string name;
    std::string value;
    auto const whole = [&] { return numberOf<int64_t>(value, name, "a whole number"); };
    auto const real = [&] { return numberOf<double>(value, name, "a number"); };
    std::map<std::string, std::function<void()>> const withValue = {
        {"--max-new-tokens", [&] { options.maxNewTokens = whole(); }},
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
        {"--no-speculative", [&] { command.drafting.speculative = false; }},
        {"--json", [&] { command.json = true; }},
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
        } else if (name.substr(0, 2) == "--" || !command.bundle.empty()) {
            throw gsx::UsageError("'" + name + "' is not an option", {{}, {}, "gsx-run --help"});
        } else {
            command.bundle = name;
        }
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

gsx::Tokens readIds(std::istream& stream) {
    gsx::Tokens ids;
    for (std::string word; stream >> word;) ids.push_back(numberOf<int64_t>(word, "the prompt", "token ids"));
    return ids;
}

nlohmann::json logprobsOf(std::vector<gsx::TokenLogprobs> const& tokens) {
    nlohmann::json all = nlohmann::json::array();
    for (gsx::TokenLogprobs const& one : tokens) all.push_back({{"logprob", one.logprob}, {"top", one.top}});
    return all;
}

nlohmann::json orNull(std::optional<double> value) { return value ? nlohmann::json(*value) : nlohmann::json(); }

// The same keys as `gsx generate --json`, without the text.
nlohmann::json report(gsx::Model const& model, Command const& command, gsx::Tokens const& prompt,
                      gsx::Generation const& made) {
    gsx::GenerationStats const& stats = made.stats;
    std::optional<double> budget;
    if (auto const& selection = model.bundle().manifest.selection) {
        budget = command.keep.budget.value_or(selection->budget);
    }
    std::optional<gsx::DraftKind> const draft = model.draft();
    return {{"ids", made.sequences[0].tokens},
            {"prompt_ids", prompt},
            {"finish", gsx::nameOf(made.sequences[0].finish)},
            {"logprobs", command.options.logprobs ? logprobsOf(made.sequences[0].logprobs) : nlohmann::json()},
            {"budget", orNull(budget)},
            {"draft", draft ? nlohmann::json(gsx::toString(*draft)) : nlohmann::json()},
            {"stats",
             {{"prompt_tokens", stats.promptTokens},
              {"new_tokens", stats.newTokens},
              {"prefill_seconds", stats.prefillSeconds},
              {"decode_seconds", stats.decodeSeconds},
              {"decode_steps", stats.decodeSteps},
              {"decode_tokens_per_second", orNull(stats.decodeTokensPerSecond())},
              {"draft_seconds", stats.draftSeconds},
              {"verify_seconds", stats.verifySeconds},
              {"drafted_by_place", stats.drafted},
              {"accepted_by_place", stats.accepted},
              {"acceptance", orNull(stats.acceptance())},
              {"tokens_per_verification", orNull(stats.tokensPerVerification())},
              {"kept_share", orNull(stats.keptShare())}}}};
}

void run(Command command) {
    gsx::Model model = open(command);
    gsx::Tokens const prompt = readIds(std::cin);
    command.options.keep = {command.keep};
    if (!command.json) {
        command.options.onToken = [](size_t, int64_t token) {
            std::cout << token << std::endl;
            return !std::cout;  // the reader has gone
        };
    }
    gsx::Generation const made = model.generate({prompt}, command.options);
    if (command.json) std::cout << report(model, command, prompt, made).dump() << std::endl;
}

}  // namespace

int main(int count, char** arguments) {
    try {
        Command const command = parse(count, arguments);
        if (command.help) {
            std::cout << kHelp;
        } else {
            run(command);
        }
    } catch (gsx::UsageError const& error) {
        std::cerr << "gsx-run: " << error.what() << "\n";
        return kUsedWrongly;
    } catch (std::exception const& error) {
        std::cerr << "gsx-run: " << error.what() << "\n";
        return 1;
    }
    return 0;
}
