"""Compute what is frozen once: codes (cached features), their store, and classifiers on them."""
