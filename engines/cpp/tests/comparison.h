// Comparing what C++ makes of a vector with what Python made of it (tests/vectors/make.py).

#pragma once

#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <string>

#include "gsx/model.h"

// Prints a line where both differ, and counts.
void compare(std::string const& what, nlohmann::json const& found, nlohmann::json const& wanted);

// The error of gsx that an action ends with.
std::string refusalOf(std::function<void()> const& action);

gsx::Sampling samplingOf(nlohmann::json const& options);
gsx::Options optionsOf(nlohmann::json const& raw);
gsx::Drafting draftingOf(nlohmann::json const& one);

// Engines under test: opens a model of the vectors by its name and manifest; and the hash of all calls since it was last
// asked for.
struct EnginesUnderTest {
    std::function<gsx::Model(std::string const&, nlohmann::json const&, gsx::Drafting const&)> open;
    std::function<std::string()> takeCalls;
};

// Repeats every generation of `generation.json`.
void repeatGeneration(nlohmann::json const& file, EnginesUnderTest const& engines);

// Reads the file of vectors and calls what its name belongs to; prints how much was compared.
// Returns the exit code: 1 where something differs, or where there was nothing to compare.
int compareFile(std::string const& path, std::map<std::string, std::function<void(nlohmann::json const&)>> const& kinds);
