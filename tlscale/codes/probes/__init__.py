"""Classifiers fitted to codes at once, without training."""
