"""What calibration and training take where nothing else is given.

Nothing is imported here, so that a help text shows these numbers without loading torch.
"""

# Close where quality is: budgets between two points are interpolated (gsx_engines/bundle/selection.py).
BUDGET_GRID = (1.0, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)
CALIBRATION_TOKENS = 4096
# Of the text that exit classifiers are trained on.
CLASSIFIER_TOKENS = 32_768
# Optimizer steps between two snapshots of a training run.
SNAPSHOT_STEPS = 200
