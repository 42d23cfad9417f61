"""The bundle: the directory that an export writes (docs/design.md, section 7)."""
