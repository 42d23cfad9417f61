// Checks of arguments on the host, before anything is launched.

#pragma once

#include <initializer_list>

#include "native/status.h"

namespace gsx {

// A longer row, in bytes, would need more column blocks than a grid can have (rows.cuh).
constexpr int64_t kMaxRowBytes = int64_t{32} << 20;
constexpr size_t kWorkspaceAlignment = 16;

inline int64_t elementBytes(gsx_type type) {
    switch (type) {
    case GSX_FLOAT32: return 4;
    case GSX_FLOAT16:
    case GSX_BFLOAT16: return 2;
    }
    return 0;
}

inline bool aligned(const void* pointer, size_t bytes) {
    return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// Check a buffer of `count` elements: it must not be null unless it is empty, and must be aligned to its elements.
inline gsx_status checkBuffer(const void* pointer, int64_t count, size_t elementBytes) {
    if (count > 0 && pointer == nullptr) return GSX_NULL_POINTER;
    return aligned(pointer, elementBytes) ? GSX_OK : GSX_MISALIGNED;
}

inline gsx_status checkTokens(int64_t tokens) {
    if (tokens < 0) return GSX_BAD_SIZE;
    return tokens > GSX_MAX_TOKENS ? GSX_TOO_LARGE : GSX_OK;
}

inline gsx_status checkRow(int64_t width, gsx_type type) {
    const int64_t bytes = elementBytes(type);
    if (bytes == 0) return GSX_UNKNOWN_TYPE;
    if (width < 1) return GSX_BAD_SIZE;
    return width > kMaxRowBytes / bytes ? GSX_TOO_LARGE : GSX_OK;
}

inline gsx_status checkWorkspace(const void* workspace, size_t bytes, size_t needed) {
    if (needed == 0) return GSX_OK;
    if (bytes < needed) return GSX_WORKSPACE_TOO_SMALL;
    if (workspace == nullptr) return GSX_NULL_POINTER;
    return aligned(workspace, kWorkspaceAlignment) ? GSX_OK : GSX_MISALIGNED;
}

// The first failure of several checks.
inline gsx_status firstFailure(std::initializer_list<gsx_status> checks) {
    for (const gsx_status check : checks) {
        if (check != GSX_OK) return check;
    }
    return GSX_OK;
}

}  // namespace gsx
