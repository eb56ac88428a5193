"""What is frozen is computed once: codes, their store, and classifiers on them."""
