"""Fit classifiers to codes at once, without training."""
