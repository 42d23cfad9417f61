// State shared by the parts of the stand-in: recorded misuse, calls that are made to fail, and live objects.

#pragma once

#include <stdexcept>
#include <string>

#include "sha256.h"
#include "standin.h"

namespace standin {

// An access that a GPU cannot make, which it finds only while it works.
struct IllegalAccess : std::runtime_error {
    using std::runtime_error::runtime_error;
};

void misuse(std::string const& text);

// Called at the beginning of every function that can fail. Returns whether it must fail.
bool fails(char const* name);

// Whether the GPU is lost: nothing works any more (`dieAt`).
bool isDead();

void countLaunch();
// A context computed in this memory.
void noteScratch(void const* memory);

// The digest of all calls of engines.
gsx::Sha256& digest();

// Base of objects that must be freed.
class Counted {
public:
    Counted();
    ~Counted();
    Counted(Counted const&) = delete;
    Counted& operator=(Counted const&) = delete;
};

}  // namespace standin
