// `gsx-run BUNDLE`: continues a prompt with a bundle's engines, or on a CPU. See docs/cpp.md.

#include <unistd.h>

#include <csignal>
#include <iostream>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <vector>

#include "command.h"
#include "gsx/gsx.h"
#if GSX_HAS_TEXT
#include "gsx/language.h"
#endif

namespace {

constexpr int kUsedWrongly = 2;

nlohmann::json logprobsOf(std::vector<gsx::TokenLogprobs> const& tokens) {
    nlohmann::json all = nlohmann::json::array();
    for (gsx::TokenLogprobs const& one : tokens) all.push_back({{"logprob", one.logprob}, {"top", one.top}});
    return all;
}

nlohmann::json orNull(std::optional<double> value) { return value ? nlohmann::json(*value) : nlohmann::json(); }

// The same keys as `gsx generate --json`; `text` is null where ids were given.
nlohmann::json report(gsx::Model const& model, Command const& command, gsx::Tokens const& prompt,
                      gsx::Generation const& made, nlohmann::json text) {
    gsx::GenerationStats const& stats = made.stats;
    std::optional<double> budget;
    if (auto const& selection = model.bundle().manifest.selection) {
        budget = command.keep.budget.value_or(selection->budget);
    }
    std::optional<gsx::DraftKind> const draft = model.draft();
    return {{"text", std::move(text)},
            {"ids", made.sequences[0].tokens},
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
              {"kept_share", orNull(stats.keptShare())},
              {"held_share", orNull(stats.heldShare())}}}};
}

// Continue token ids.
void continueIds(gsx::Model& model, Command command) {
    gsx::Tokens const prompt = parseIds(std::cin);
    if (!command.json) {
        command.options.onToken = [](size_t, int64_t token) {
            std::cout << token << std::endl;
            return !std::cout;  // the reader has gone
        };
    }
    gsx::Generation const made = model.generate({prompt}, command.options);
    if (command.json) std::cout << report(model, command, prompt, made, nullptr).dump() << std::endl;
}

#if GSX_HAS_TEXT

volatile std::sig_atomic_t gInterrupted = 0;

// Generate, and write the text as it comes. Returns the whole of it.
std::string write(gsx::Model& model, gsx::Tokenizer const& tokenizer, gsx::Tokens const& prompt, Command const& command,
                  gsx::Options options, gsx::Generation& made) {
    gsx::TextWriter writer(tokenizer, command.stops);
    bool const shown = !command.json;
    std::string text;
    std::set<int64_t> const stops = options.stopIds ? std::set<int64_t>(options.stopIds->begin(), options.stopIds->end())
                                                    : std::set<int64_t>();
    auto const add = [&](std::string const& piece) {
        text += piece;
        if (shown) std::cout << piece << std::flush;
    };
    options.onToken = [&](size_t, int64_t token) {
        bool const ends = stops.count(token) == 0 && writer.push(token);
        add(writer.take());
        return ends || gInterrupted != 0 || (shown && !std::cout);
    };
    made = model.generate({prompt}, options);
    add(writer.finish());
    if (shown) std::cout << std::endl;
    return text;
}

void continueText(gsx::Model& model, Command const& command) {
    gsx::Tokenizer const tokenizer(model.bundle());
    gsx::Tokens const prompt = tokenizer.encode(*command.prompt);
    gsx::Generation made;
    std::string const text = write(model, tokenizer, prompt, command, command.options, made);
    if (command.json) std::cout << report(model, command, prompt, made, text).dump() << std::endl;
}

// Answer the messages on standard input. An answer that is interrupted stays in the history as far as it got; a message that
// the template or the model refuses does not.
void chat(gsx::Model& model, Command const& command) {
    gsx::Tokenizer const tokenizer(model.bundle());
    gsx::ChatTemplate const chatTemplate(model.bundle(), tokenizer);
    gsx::Options options = command.options;
    options.stopIds = chatTemplate.stopIds();
    bool const terminal = isatty(STDIN_FILENO) != 0;
    std::signal(SIGINT, [](int) { gInterrupted = 1; });
    std::vector<gsx::Message> messages;
    for (std::string line; terminal && std::cout << "> " << std::flush, std::getline(std::cin, line);) {
        if (line.empty()) continue;
        gInterrupted = 0;
        messages.push_back({"user", line});
        try {
            gsx::Generation made;
            std::string answer = write(model, tokenizer, chatTemplate.prompt(messages), command, options, made);
            messages.push_back({"assistant", std::move(answer)});
        } catch (gsx::UsageError const& error) {
            messages.pop_back();
            std::cerr << "gsx-run: " << error.what() << "\n";
        }
        if (!std::cout) return;
    }
}

#endif

void run(Command command) {
    command.options.keep = {command.keep};
#if !GSX_HAS_TEXT
    if (command.chat || command.prompt) {
        throw gsx::UsageError("this gsx-run was built without text",
                              {"token ids on standard input", command.chat ? "--chat" : "a prompt",
                               "build it with GSX_TEXT (docs/cpp.md)"});
    }
#endif
    gsx::Model model = open(command);
#if GSX_HAS_TEXT
    if (command.chat) return chat(model, command);
    if (command.prompt) return continueText(model, command);
#endif
    continueIds(model, std::move(command));
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
