"""Unfinished scores on disk: an interrupted pass over 50,000 images continues from where it was last saved.

Ctrl-C saves it too. Each rank has a file in the cache folder, named by a digest of everything that determines the
statistics. The sums and features are restored exactly as they were after that batch, so the scores are those of an
uninterrupted run, bit for bit.
"""

import contextlib
import hashlib
import json
import signal
import time
import zipfile
import zlib

import click
import numpy as np
import torch

from dnnlib import UserError
from dnnlib.download import cache_dir
from dnnlib.files import atomic_write, make_dirs
from torch_utils import distributed as dist
from torch_utils.signals import defer_signal

FORMAT = 2  # increase it whenever the same images would give other statistics, or other arrays are saved
SAVE_SECONDS = 60  # between two saves
SAVE_SHARE = 0.05  # largest share of the time spent on saving; 50,000 features are 400 MB


class Unfinished:
    """A pass over images that may be interrupted and continued later.

    Args:
        identity: Plain JSON values: all that determines the statistics, besides what is added here. Equal on all ranks.
    """

    def __init__(self, identity):
        device = dist.device()
        threads = torch.get_num_threads() if device.type == 'cpu' else None  # they affect the last digit
        computed_by = [FORMAT, torch.__version__, device.type, threads, dist.get_world_size()]
        text = json.dumps([computed_by, identity], sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:24]
        self.path = cache_dir() / 'unfinished-scores' / f'{digest}-rank{dist.get_rank()}.npz'
        self.started = self.saved = time.monotonic()
        self.earlier_sec, self.pause, self.works = 0.0, SAVE_SECONDS, True

    def seconds(self):
        """Time spent on this pass, interrupted attempts included."""
        return self.earlier_sec + time.monotonic() - self.started

    def load(self):
        """The saved state, as `Accumulator.restore` takes it, or None. A damaged file counts as none."""
        try:
            with open(self.path, 'rb') as f, np.load(f, allow_pickle=False) as z:
                state = dict(z)
            self.earlier_sec = float(state.pop('seconds'))
            return state
        except (OSError, ValueError, AttributeError, TypeError, EOFError, KeyError, zipfile.BadZipFile, zlib.error):
            return None

    @contextlib.contextmanager
    def saved_on_ctrl_c(self, accumulator):
        """Context that saves the state if Ctrl-C ends it; the accumulator itself is not to be interrupted."""
        try:
            yield
        except KeyboardInterrupt:
            if self.works and accumulator.index > accumulator.share.start:
                with defer_signal(signal.SIGINT):  # it comes twice: from the terminal, and from torchrun
                    self.save(accumulator)
            raise

    def save_if_due(self, accumulator):
        """Save the state if the last save was long enough ago."""
        if self.works and time.monotonic() >= self.saved + self.pause:
            self.save(accumulator)

    def save(self, accumulator):
        """Save the state. Where that is impossible, the work goes on regardless."""
        started = time.monotonic()
        try:
            make_dirs(self.path.parent)
            with atomic_write(self.path) as f:
                np.savez(f, seconds=self.seconds(), **accumulator.state())
        except UserError as e:
            self.works = False
            click.echo(f'Warning: progress cannot be saved, so an interruption would lose it: {e.message}', err=True)
        self.saved = time.monotonic()
        self.pause = max(SAVE_SECONDS, (self.saved - started) / SAVE_SHARE)

    def remove(self):
        """Delete the saved state: the scores are known."""
        with contextlib.suppress(OSError):  # an unwritable cache has nothing of ours, or keeps it
            self.path.unlink()
