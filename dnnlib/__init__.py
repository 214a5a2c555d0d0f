"""Plumbing that knows nothing about images or networks: files, downloads, messages."""

from dnnlib.errors import UserError

__all__ = ['UserError']
