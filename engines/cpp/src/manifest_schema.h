// The schema of `gsx.json`, compiled in: the file that gsx_engines/bundle/schema.py generates from the Python manifest.

#pragma once

namespace gsx {

extern char const* const kManifestSchema;

}  // namespace gsx
