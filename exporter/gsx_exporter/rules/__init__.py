"""Keep rules: how each method decides which tokens run which branch. One folder for each; `registry.py` is the list.

A folder holds all that is known of its rule: `policy.py` (option text -> plan -> manifest section), `traced.py` (the
rule as the decoder traces it), `reference.py` (the same by masks, sharing no code), and calibration of its own.
"""
