#include "races.h"

#include <algorithm>

namespace emulation {
namespace {

// Bytes that count as one place: the kernels share nothing smaller side by side.
constexpr uintptr_t kGranule = 2;
constexpr uintptr_t kPageCells = 2048;
constexpr uint32_t kSeveral = ~uint32_t{0};  // more than one thread of a block

bool knows(const Clock& clock, uint32_t block, uint32_t stretch) {
    return block < clock.size() && stretch < clock[block];
}

}  // namespace

void join(Clock& into, const Clock& other) {
    if (into.size() < other.size()) into.resize(other.size());
    for (size_t i = 0; i < other.size(); ++i) into[i] = std::max(into[i], other[i]);
}

Accesses::Cell& Accesses::cell(uintptr_t granule) {
    const uintptr_t number = granule / kPageCells;
    if (number != mLastNumber) {
        Page& page = mPages[number];  // stays where it is when others are added
        page.resize(kPageCells);
        mLastNumber = number;
        mLastPage = &page;
    }
    Cell& cell = (*mLastPage)[granule % kPageCells];
    if (cell.era != mEra) {
        cell.era = mEra;
        cell.reads.clear();
        cell.writes.clear();
    }
    return cell;
}

bool Accesses::races(const Actor& actor, const void* at, size_t bytes, Access access) {
    const bool strong = access == Access::kStrongRead || access == Access::kStrongWrite;
    const bool writes = access == Access::kWrite || access == Access::kStrongWrite;
    const auto conflicts = [&](const Entry& entry) {
        if (strong && entry.strong) return false;
        if (entry.block == actor.block) return entry.thread != actor.thread && entry.stretch == actor.stretch;
        return !knows(actor.known, entry.block, entry.stretch) && !knows(actor.own.acquired, entry.block, entry.stretch);
    };
    const uintptr_t first = reinterpret_cast<uintptr_t>(at) / kGranule;
    const uintptr_t last = (reinterpret_cast<uintptr_t>(at) + bytes - 1) / kGranule;
    for (uintptr_t granule = first; granule <= last; ++granule) {
        Cell& cell = this->cell(granule);
        if (std::any_of(cell.writes.begin(), cell.writes.end(), conflicts)) return true;
        if (writes && std::any_of(cell.reads.begin(), cell.reads.end(), conflicts)) return true;
        std::vector<Entry>& entries = writes ? cell.writes : cell.reads;
        if (access == Access::kWrite) {  // all others come before it
            cell.reads.clear();
            cell.writes.clear();
        }
        const auto mine = std::find_if(entries.begin(), entries.end(), [&](const Entry& entry) {
            return entry.block == actor.block && entry.strong == strong;
        });
        if (mine == entries.end()) {
            entries.push_back({actor.block, actor.stretch, actor.thread, strong});
        } else {
            const bool others = mine->stretch == actor.stretch && mine->thread != actor.thread;
            *mine = {actor.block, actor.stretch, others ? kSeveral : actor.thread, strong};
        }
    }
    return false;
}

}  // namespace emulation
