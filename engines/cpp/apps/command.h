// What `gsx-run` is asked for on its command line.

#pragma once

#include <optional>
#include <string>
#include <vector>

#include "gsx/generation.h"
#include "gsx/model.h"

struct Command {
    std::string bundle;
    // Unset: token ids from standard input.
    std::optional<std::string> prompt;
    // Texts that end the generation, and are left out of what is written.
    std::vector<std::string> stops;
    gsx::Keep keep;
    gsx::Options options;
    gsx::Drafting drafting;
    std::string backend;
    std::optional<int> threads;
    std::optional<std::string> plugins;
    bool chat = false;
    bool json = false;
    bool help = false;
};

extern char const* const kHelp;

// The runtimes that this program was built for; the first is the default.
std::vector<std::string> backends();

// Throws UsageError.
Command parse(int count, char** arguments);

// A bundle on the runtime that is asked for. Throws what opening it throws.
gsx::Model open(Command const& command);

// Token ids as text. Throws UsageError.
gsx::Tokens parseIds(std::istream& stream);
