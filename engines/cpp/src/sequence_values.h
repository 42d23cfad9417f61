// Run-time values by sequence: those of some sequences of a batch, or one value written out for all. As the functions of
// gsx_engines/bundle/controls.py.

#pragma once

#include <cstdint>

#include "stage.h"

namespace gsx {

// The values of sequences [start, stop). One value may stand for all sequences; it stays.
Controls valuesOfRows(Controls const& controls, int64_t start, int64_t stop);

// The values with one for each of `batch` sequences, where one stood for all.
Controls valuesOfEach(Controls const& controls, int64_t batch);

}  // namespace gsx
