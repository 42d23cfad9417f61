// The schema of `gsx.json`, compiled in: the file that Python writes from its own manifest (gsx_engines/bundle/schema.py).

#pragma once

namespace gsx {

extern char const* const kManifestSchema;

}  // namespace gsx
