"""The bundle: the directory that an export writes (design.md, section 7)."""
