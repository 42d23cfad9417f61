"""HTML pages of reports: one file each, with everything in it."""
