"""Plumbing that knows nothing about images or networks: files, downloads, messages."""

from dnnlib.errors import UserError, chosen

__all__ = ['UserError', 'chosen']
