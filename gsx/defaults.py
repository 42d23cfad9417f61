"""Default values of the public functions; their commands show the same numbers.

Only constants and no imports, so that a help text loads nothing. Each other floor has a `defaults.py` of its own.
"""

# New tokens of `generate`.
NEW_TOKENS = 128
# Where `serve` listens: this machine only, and the port that clients of such servers expect. How long a request may
# take, and how long those under way may at the end; orchestrators kill after 30 seconds.
SERVE_HOST, SERVE_PORT = "127.0.0.1", 8000
REQUEST_SECONDS, DRAIN_SECONDS = 600.0, 25
# Tokens of text that a bundle is verified on, and of the greedy continuation. Quality limits, which bundles that round
# have, are decided by means over tokens, and need more of them.
VERIFY_TOKENS, QUALITY_TOKENS, GREEDY_TOKENS = 1024, 8192, 256
# Tokens of a sample of a bundle that is larger than memory: their states in every layer are compared.
SAMPLE_TOKENS = 64
# Tokens of text that a layer study reads.
STUDY_TOKENS = 2048
# Tokens that a comparison measures on. As many tokens before them are used for calibration: with this default, as many
# as an export takes.
COMPARE_TOKENS = 4096
# Where a comparison keeps its bundles.
COMPARE_FOLDER = "gsx-compare"
# Where tuning keeps bundles and measurements, how long it may take, and how many tokens it measures on; and the answers
# that it times.
TUNE_FOLDER, TUNE_SECONDS, TUNE_TOKENS = "gsx-tune", 600.0, 4096
TUNE_PROMPT_TOKENS, TUNE_NEW_TOKENS = 128, 64
# Limit of what 8 bits may cost: the relative change in perplexity, and the share of decisions that flip.
QUALITY_LIMIT = 0.01
# KL divergence in nats: where activations, K or V are in 8 bits; where only weights are; where all is in 16 bits.
DIVERGENCE_LIMIT, WEIGHTS_DIVERGENCE_LIMIT, HALF_DIVERGENCE_LIMIT = 0.02, 0.006, 0.006
# Share of tokens whose most likely next token must be the same.
TOP1_LIMIT = 0.93
# The same with weights in 4 bits.
INT4_DIVERGENCE_LIMIT, INT4_PERPLEXITY_LIMIT, INT4_TOP1_LIMIT = 0.1, 0.1, 0.85
# What a benchmark times: prompts of these lengths (as far as they fit into the model's context), new tokens, rounds,
# and the seconds after which it takes no further round.
BENCH_PROMPT_TOKENS, BENCH_NEW_TOKENS, BENCH_ROUNDS, BENCH_SECONDS = (128, 512), 64, 5, 180.0
