"""A time limit and locks, so that a study can be run piece by piece and by several workers."""

import contextlib
import fcntl
import time

from dnnlib import UserError


class OutOfTime(Exception):
    """Raised when the time of this piece of the study is used up."""


class Clock:
    """Counts down a piece of `minutes`; 0 means no limit."""

    def __init__(self, minutes=0):
        self.end = time.monotonic() + 60 * minutes if minutes else float('inf')

    def left(self):
        """Seconds left."""
        return self.end - time.monotonic()

    def need(self, seconds):
        """Raise OutOfTime unless `seconds` are left."""
        if self.left() < seconds:
            raise OutOfTime


@contextlib.contextmanager
def claimed(path, wait=False):
    """Context that holds the lock file `path`: yields the open file, or None if another process has it (unless `wait`).

    The lock lasts until every process with the open file has closed it or ended, so a child that inherits it
    (`pass_fds`) keeps the lock even if its parent is killed.

    Raises:
        UserError: the disk has no locks, as some shared ones.
    """
    with open(path, 'a') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield None
            return
        except OSError as e:
            raise UserError(f'could not lock {path}: {e.strerror or e}; choose an --outdir on a disk with file locks, '
                            'such as a local one') from e
        yield file
