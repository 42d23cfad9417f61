// The C++ runtime of gsx: a bundle generates. See docs/cpp.md.

#pragma once

#include "gsx/bundle.h"
#include "gsx/error.h"
#include "gsx/generation.h"
#include "gsx/model.h"
#include "gsx/sampling.h"
