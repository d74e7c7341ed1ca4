"""Sweeps of hyperparameters over widths and other axes: trials, workers, what transfers, the target's run file."""
