"""Defaults of calibration and training.

Nothing is imported here, so that help texts can show these numbers without loading torch.
"""

# Denser at high budgets, where quality is best: between two points, thresholds are interpolated
# (gsx_engines/bundle/selection.py).
BUDGET_GRID = (1.0, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)
CALIBRATION_TOKENS = 4096
# Length of the text that exit classifiers are trained on.
CLASSIFIER_TOKENS = 32_768
