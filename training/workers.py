"""Processes, including this one, that work through chunks of items in parallel; results come in order."""

import collections
import concurrent.futures
import contextlib
import functools
import itertools
import multiprocessing
import os
import pickle
import threading

from dnnlib import UserError
from torch_utils.signals import defer_signals

AHEAD = 2  # chunks queued for each of the other processes


class Workers:
    """A context in which `map` uses `count` processes, this one included.

    The others start when it is entered, so that their imports run while this one still finds out what there is to do.
    Ctrl-C is handled by this process: the others never see it. They end with it, even if it is killed.
    """

    def __init__(self, count=1):
        self.others, self.pool = count - 1, None

    def __enter__(self):
        if self.others:
            # Spawned rather than forked: forking a process that has threads (PyTorch's, tqdm's) may deadlock.
            try:
                self.pool = concurrent.futures.ProcessPoolExecutor(self.others, multiprocessing.get_context('spawn'),
                                                                   initializer=_end_with_parent)
            except (ImportError, OSError) as e:  # no shared memory, as in some containers
                raise UserError(f'could not start worker processes ({e}); run again with --workers=1') from e
            with _report_broken_pool():
                for _ in range(self.others):
                    self._submit(_nothing)
        return self

    def __exit__(self, *_):
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def _submit(self, *call):
        with defer_signals():  # a process started in it never sees Ctrl-C
            return self.pool.submit(*call)

    def map(self, function, chunks):
        """Yield ``function(chunk)`` for each chunk, in order; few are in flight at a time, so memory stays bounded.

        This process takes a chunk itself whenever the next result is not ready yet.

        Args:
            function: Picklable; each process unpickles it once.
            chunks: Iterable of picklable chunks.

        Raises:
            UserError: a process died.
        """
        if not self.others:
            yield from map(function, chunks)
            return
        chunks = iter(chunks)
        pickled = pickle.dumps(function)
        pending = collections.deque()  # in order: the others' futures, or this process's results
        with _report_broken_pool():
            while True:
                waiting = sum(isinstance(result, concurrent.futures.Future) and not result.done() for result in pending)
                pending.extend(self._submit(_call, pickled, chunk) for chunk in
                               itertools.islice(chunks, max(AHEAD * self.others - waiting, 0)))
                if not pending:
                    return
                if not isinstance(pending[0], concurrent.futures.Future):
                    yield pending.popleft()
                elif (pending[0].done() or len(pending) >= 2 * AHEAD * (self.others + 1)
                      or (chunk := next(chunks, None)) is None):
                    yield pending.popleft().result()
                else:
                    pending.append(function(chunk))


ALONE = Workers()  # this process alone; need not be entered


@contextlib.contextmanager
def _report_broken_pool():
    try:
        yield
    except concurrent.futures.process.BrokenProcessPool as e:
        raise UserError('a worker process died, perhaps for lack of memory; run again with --workers=1') from e


def _end_with_parent():
    """Tie this process to its parent, which may be killed; otherwise it would wait for work for ever."""
    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def _nothing():
    """A call that only starts a process."""


@functools.lru_cache(maxsize=1)
def _unpickled(data):
    return pickle.loads(data)


def _call(pickled, chunk):
    return _unpickled(pickled)(chunk)
