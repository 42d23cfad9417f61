// The errors that gsx shows to people. As in gsx_plugins/errors.py, each has four parts.

#pragma once

#include <optional>
#include <stdexcept>
#include <string>

namespace gsx {

// What was expected, what was found, and what to do about it; each part may be missing.
struct Facts {
    std::optional<std::string> expected;
    std::optional<std::string> found;
    std::optional<std::string> todo;
};

// Something went wrong that the user can fix. `what()` is the whole message, at most three lines long.
class Error : public std::runtime_error {
public:
    Error(std::string const& thing, Facts facts);

    // The thing and what is wrong with it.
    std::string const& thing() const noexcept { return mThing; }
    Facts const& facts() const noexcept { return mFacts; }

private:
    std::string mThing;
    Facts mFacts;
};

// An option or argument, or a combination of them, that cannot be used.
class UsageError : public Error {
public:
    explicit UsageError(std::string const& thing, Facts facts = {}) : Error(thing, std::move(facts)) {}
};

// A bundle that is missing, damaged, changed after export, or written by another version.
class BundleError : public Error {
public:
    explicit BundleError(std::string const& thing, Facts facts = {}) : Error(thing, std::move(facts)) {}
};

// An engine that cannot be loaded or run here: its runtime, its GPU, its profiles or its plugins.
class EngineError : public Error {
public:
    explicit EngineError(std::string const& thing, Facts facts = {}) : Error(thing, std::move(facts)) {}
};

// A GPU that this process can no longer use: its memory and its engines are gone, and only a new process gets others. End
// the process, or at least load no model again.
class LostGpuError : public EngineError {
public:
    explicit LostGpuError(std::string const& thing, Facts facts = {}) : EngineError(thing, std::move(facts)) {}
};

}  // namespace gsx
