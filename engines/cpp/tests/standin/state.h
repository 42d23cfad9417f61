// What the parts of the stand-in share: the book of misuse, calls that are to fail, objects that live.

#pragma once

#include <stdexcept>
#include <string>

#include "sha256.h"
#include "standin.h"

namespace standin {

// What a GPU finds out while it works: an access that it cannot make.
struct IllegalAccess : std::runtime_error {
    using std::runtime_error::runtime_error;
};

void misuse(std::string const& text);

// Begins a call that can fail. Returns whether it is to fail.
bool fails(char const* name);

void countLaunch();

// The digest that the engines write into.
gsx::Sha256& digest();

// An object that has to be freed.
class Counted {
public:
    Counted();
    ~Counted();
    Counted(Counted const&) = delete;
    Counted& operator=(Counted const&) = delete;
};

}  // namespace standin
