"""Plumbing around PyTorch: ranks, random state, statistics."""
