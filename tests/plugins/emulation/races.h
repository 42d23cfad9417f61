// Which accesses to memory come in an order that CUDA promises, and which do not: a race detector with vector clocks, as
// in FastTrack (Flanagan and Freund, 2009), over CUDA's rules.
//
// A block's time is counted in stretches from barrier to barrier. What orders two accesses:
// - the same thread made both, or the same block with a barrier between;
// - a chain: a barrier after the first; a fence, then an atomic or volatile write by one thread; an atomic or volatile
//   read of the same address by a thread of another block, then a fence; and a barrier, unless that thread itself makes
//   the second access.
// Two atomic or volatile accesses never race. Stricter than CUDA: a fence gives on what was done before the last barrier,
// not what its thread did since; and warp operations order nothing (CUDA does not promise that they do).

#pragma once

#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <vector>

namespace emulation {

// For every block of the launch the stretches that are known to be over; blocks behind the end: none.
using Clock = std::vector<uint32_t>;
void join(Clock& into, const Clock& other);

// What a thread learnt since the last barrier, and what it gives on.
struct Knowledge {
    Clock seen;      // by atomic and volatile reads; counts after a fence
    Clock acquired;  // counts for this thread, and after the next barrier for the block
    Clock given;     // as of the last fence
};

// A thread that accesses memory.
struct Actor {
    uint32_t block, thread, stretch;
    const Clock& known;  // to its block
    const Knowledge& own;
};

enum class Access { kRead, kWrite, kStrongRead, kStrongWrite };  // strong: atomic or volatile

// The accesses to one piece of memory: global memory, or the shared memory of one block.
class Accesses {
public:
    // Take note of an access. Returns whether it races with an earlier one.
    bool races(const Actor& actor, const void* at, size_t bytes, Access access);
    void forget() { ++mEra; }

private:
    struct Entry {  // the last access of its kind by a block
        uint32_t block, stretch, thread;
        bool strong;
    };
    struct Cell {
        uint32_t era = 0;
        std::vector<Entry> reads, writes;
    };
    using Page = std::vector<Cell>;

    Cell& cell(uintptr_t granule);

    uint32_t mEra = 1;  // what cells of another one hold is forgotten
    std::unordered_map<uintptr_t, Page> mPages;
    uintptr_t mLastNumber = ~uintptr_t{0};
    Page* mLastPage = nullptr;
};

}  // namespace emulation
