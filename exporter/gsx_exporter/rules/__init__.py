"""Keep rules: how each method decides which tokens run which branch. Each has a folder; `registry.py` lists them.

A folder has everything about its rule: `policy.py` (option text -> plan -> manifest section), `traced.py` (the rule as
the decoder traces it), `reference.py` (the same as masks, sharing no code), and its calibration.
"""
