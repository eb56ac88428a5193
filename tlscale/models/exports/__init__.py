"""The trained model in formats of others: one file a format, and the check that all of them pass."""
