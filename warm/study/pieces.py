"""What lets a study be carried out in pieces, by several workers: a limit of time, and locks."""

import contextlib
import fcntl
import time


class OutOfTime(Exception):
    """The piece's time is spent."""


class Clock:
    """Time left of a piece of `minutes`; 0: no limit."""

    def __init__(self, minutes=0):
        self.end = time.monotonic() + 60 * minutes if minutes else float('inf')

    def left(self):
        """Seconds left."""
        return self.end - time.monotonic()

    def need(self, seconds):
        """Raise OutOfTime unless that many seconds are left."""
        if self.left() < seconds:
            raise OutOfTime


@contextlib.contextmanager
def claimed(path, wait=False):
    """Hold a lock file for a while; yields it, None if another holds it.

    The lock goes when the last process dies that has the open file: a child that is given it (`pass_fds`) keeps it for
    a parent that is killed.
    """
    with open(path, 'a') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield None
            return
        yield file
