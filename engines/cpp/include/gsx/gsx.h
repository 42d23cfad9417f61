// The C++ runtime of gsx: generating text with a bundle. See docs/cpp.md.

#pragma once

#include "gsx/bundle.h"
#include "gsx/error.h"
#include "gsx/generation.h"
#include "gsx/model.h"
#include "gsx/sampling.h"
