"""HTML pages of reports, each a single self-contained file."""
