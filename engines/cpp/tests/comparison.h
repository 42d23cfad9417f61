// Comparing the results of C++ for a vector with those of Python (tests/vectors/make.py).

#pragma once

#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <string>

#include "gsx/model.h"

// Counts a comparison, and prints a line if the two differ.
void compare(std::string const& what, nlohmann::json const& found, nlohmann::json const& wanted);

// The message of the gsx error that an action ends with.
std::string refusalOf(std::function<void()> const& action);

gsx::Sampling samplingOf(nlohmann::json const& options);
gsx::Options optionsOf(nlohmann::json const& raw);
gsx::Drafting draftingOf(nlohmann::json const& one);

// The engines under test. `open` opens a model of the vectors by name and manifest; `takeCalls` returns the hash of all
// calls since it was last called.
struct EnginesUnderTest {
    std::function<gsx::Model(std::string const&, nlohmann::json const&, gsx::Drafting const&)> open;
    std::function<std::string()> takeCalls;
};

// Repeats every generation of `generation.json`.
void repeatGeneration(nlohmann::json const& file, EnginesUnderTest const& engines);

// Reads a file of vectors, calls the function for its name, and prints how much was compared.
// Returns the exit code: 1 if something differs, or if there was nothing to compare.
int compareFile(std::string const& path, std::map<std::string, std::function<void(nlohmann::json const&)>> const& kinds);
