"""What the public functions take where nothing else is given; their commands show the same numbers.

Nothing is imported here but numbers: a help text loads nothing. Those of the other floors are in their `defaults.py`.
"""

# New tokens of `generate`.
NEW_TOKENS = 128
# Tokens of text that a bundle is verified on, and of the greedy continuation.
VERIFY_TOKENS, GREEDY_TOKENS = 1024, 256
# The same of a layer study.
STUDY_TOKENS = 2048
# Measured tokens of a comparison; as many before them calibrate, which is then what an export takes by default.
COMPARE_TOKENS = 4096
# Where a comparison keeps its bundles.
COMPARE_FOLDER = "gsx-compare"
# Limits of what 8 bits may cost: of the rise in perplexity, and of the share of decisions that turn.
QUALITY_LIMIT = 0.01
