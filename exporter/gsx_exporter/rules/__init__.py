"""Keep rules: how each method decides which tokens run which branch. One file a rule; `base.py` says what a rule is."""
