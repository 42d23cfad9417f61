#include "gsx/error.h"

namespace gsx {
namespace {

std::string message(std::string const& thing, Facts const& facts) {
    std::string text = thing;
    if (facts.expected || facts.found) {
        text += "\n  ";
        if (facts.expected) text += "expected " + *facts.expected;
        if (facts.expected && facts.found) text += ", ";
        if (facts.found) text += "found " + *facts.found;
    }
    if (facts.todo) text += "\n  " + *facts.todo;
    return text;
}

}  // namespace

Error::Error(std::string const& thing, Facts facts)
    : std::runtime_error(message(thing, facts)), mThing(thing), mFacts(std::move(facts)) {}

}  // namespace gsx
