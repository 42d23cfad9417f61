#include "state.h"

#include <set>
#include <utility>

namespace standin {
namespace {

// Not synchronized: gsx makes one call at a time.
struct State {
    Machine machine;
    gsx::Sha256 digest;
    std::vector<std::string> misuse;
    int64_t alive = 0;
    int64_t calls = 0;
    int64_t launches = 0;
    int64_t failing = 0;
    int64_t dying = 0;
    std::set<void const*> scratch;
    std::string failingName;
    std::string failed;
};

State& state() {
    static State one;
    return one;
}

}  // namespace

Machine& machine() { return state().machine; }
std::string takeCalls() { return std::exchange(state().digest, {}).finish(); }
std::vector<std::string> takeMisuse() { return std::exchange(state().misuse, {}); }
int64_t alive() { return state().alive; }
int64_t calls() { return state().calls; }
int64_t graphLaunches() { return state().launches; }
void failAt(int64_t call) { state().failing = call; }
void dieAt(int64_t call) { state().dying = call; }
size_t scratchBlocks() { return state().scratch.size(); }
void failAlways(std::string const& name) { state().failingName = name; }
std::string takeFailed() { return std::exchange(state().failed, {}); }

void misuse(std::string const& text) { state().misuse.push_back(text); }

bool fails(char const* name) {
    State& one = state();
    ++one.calls;
    if (!isDead() && one.calls != one.failing && one.failingName != name) return false;
    one.failed = name;
    return true;
}

bool isDead() { return state().dying > 0 && state().calls >= state().dying; }
void noteScratch(void const* memory) { state().scratch.insert(memory); }
void countLaunch() { ++state().launches; }
gsx::Sha256& digest() { return state().digest; }

Counted::Counted() { ++state().alive; }
Counted::~Counted() { --state().alive; }

}  // namespace standin
