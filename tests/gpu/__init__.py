"""Everything that needs a GPU. `python -m tests.gpu` builds, checks and times the kernels in one call."""
