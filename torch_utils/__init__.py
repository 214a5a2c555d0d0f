"""Plumbing around PyTorch: ranks, signals, precision, statistics, the data's order."""
