"""What a training run reports: status lines, stats.jsonl, and a progress line on the terminal."""

import math
import os
import pathlib
import re
import sys
import time

import psutil
import torch

from dnnlib import UserError
from dnnlib.files import atomic_write
from dnnlib.json_files import append_line, json_line, parse_object
from dnnlib.text import format_time
from torch_utils import distributed as dist
from torch_utils import training_stats
from training.run_files import LOG_NAME, STATS_NAME


class Status:
    """Timing and statistics of a run: what happens at the end of a tick, except saving.

    Times are `time.monotonic`'s, as the clock may be set back: a state with negative seconds could not be resumed.

    Args:
        run_dir: Folder of stats.jsonl.
        nimg, total_nimg: Images seen so far, and at the end.
        earlier_sec: Seconds of training before the run was resumed.
        device: Device whose peak memory is reported, if it is a GPU.
        tensorboard: Whether to write the statistics to TensorBoard event files too (`open_writer`).
    """

    def __init__(self, run_dir, nimg, total_nimg, earlier_sec, device, tensorboard=False):
        self.started = time.monotonic() - earlier_sec
        self.device = device
        self.collector = training_stats.Collector()
        self.line = ProgressLine(nimg, total_nimg)
        self.path = pathlib.Path(run_dir) / STATS_NAME
        self.writer = open_writer(run_dir) if tensorboard else None
        self.added = {}
        self.maintenance = 0.0
        self.tick_nimg, self.tick_time = nimg, time.monotonic()

    def elapsed(self):
        """Seconds of training so far, including before the run was resumed."""
        return time.monotonic() - self.started

    def tick_seconds(self):
        """Seconds since the tick began."""
        return time.monotonic() - self.tick_time

    def end_tick(self, tick, nimg):
        """Print EDM's status line and report its numbers; the time until `start_tick` counts as maintenance."""
        self.ended = time.monotonic()
        self.line.clear()
        for name, value in self.fields(tick, nimg).items():
            training_stats.report(name, value)
        self.collector.update()
        print_status(self.collector)

    def last_line(self):
        """Statistics of the last completed tick, as in its line of stats.jsonl; {} before the first."""
        stats = self.collector.as_dict()
        return {**stats, 'timestamp': time.time()} if stats else {}

    def add(self, values):
        """Add {name: value}, known to rank 0 only, to the stats.jsonl line of the tick just completed."""
        self.added.update({name: {'num': 1, 'mean': value, 'std': 0.0} for name, value in values.items()})

    def start_tick(self, nimg):
        """Append the completed tick's line to stats.jsonl and start timing the next tick."""
        stats = {**self.collector.as_dict(), **self.added}
        self.added = {}
        if dist.get_rank() == 0:
            append_line(self.path, {**stats, 'timestamp': time.time()},
                        remedy='free some space and resume from the last training state')
        if self.writer is not None:
            for name, value in stats.items():
                self.writer.add_scalar(name, value['mean'], global_step=nimg)
            self.writer.flush()
        self.tick_nimg, self.tick_time = nimg, time.monotonic()
        self.maintenance = self.tick_time - self.ended

    def fields(self, tick, nimg):
        """The numbers of the status line, by their names in stats.jsonl; resets the GPU's peak-memory counters."""
        tick_sec = self.ended - self.tick_time
        cuda = self.device.type == 'cuda'
        fields = {
            'Progress/tick': tick,
            'Progress/kimg': nimg / 1000,
            'Timing/total_sec': self.elapsed(),
            'Timing/sec_per_tick': tick_sec,
            'Timing/sec_per_kimg': tick_sec / (nimg - self.tick_nimg) * 1000,
            'Timing/maintenance_sec': self.maintenance,
            'Resources/cpu_mem_gb': psutil.Process(os.getpid()).memory_info().rss / 2 ** 30,
            'Resources/peak_gpu_mem_gb': torch.cuda.max_memory_allocated(self.device) / 2 ** 30 if cuda else 0,
            'Resources/peak_gpu_mem_reserved_gb': torch.cuda.max_memory_reserved(self.device) / 2 ** 30 if cuda else 0,
        }
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        return fields


def print_status(collector):
    """Print EDM's status line, averaged over the ranks."""
    mean = collector.mean
    dist.print0(' '.join([
        f"tick {mean('Progress/tick'):<5.0f}",
        f"kimg {mean('Progress/kimg'):<9.1f}",
        f"time {format_time(mean('Timing/total_sec')):<12s}",
        f"sec/tick {mean('Timing/sec_per_tick'):<7.1f}",
        f"sec/kimg {mean('Timing/sec_per_kimg'):<7.2f}",
        f"maintenance {mean('Timing/maintenance_sec'):<6.1f}",
        f"cpumem {mean('Resources/cpu_mem_gb'):<6.2f}",
        f"gpumem {mean('Resources/peak_gpu_mem_gb'):<6.2f}",
        f"reserved {mean('Resources/peak_gpu_mem_reserved_gb'):<6.2f}",
        f"loss {mean('Loss/loss'):<7.4f}",
    ]))


def trim_records(run_dir, tick, last_line):
    """Cut stats.jsonl and log.txt back to where a run resumes, dropping tick `tick` and later ones.

    Args:
        last_line: Statistics of tick − 1 (`Status.last_line`), added to stats.jsonl if that line is missing; or {}.

    Raises:
        UserError: the files cannot be read or written.
    """
    def parsed(line):
        try:
            return float(parse_object(line)['Progress/tick']['mean'])
        except (ValueError, KeyError, TypeError):
            return math.inf  # a line cut off when the run ended
    lines = [line for line in _lines(run_dir, STATS_NAME) if parsed(line) < tick]
    if last_line and not any(parsed(line) == tick - 1 for line in lines):
        lines.append(json_line(last_line))
    log = _lines(run_dir, LOG_NAME)
    log = [line for line in log if not ((m := re.match(r'tick (\d+) ', line)) and int(m[1]) >= tick)]
    for name, content in ((STATS_NAME, lines), (LOG_NAME, log)):
        if content or os.path.exists(os.path.join(run_dir, name)):
            with atomic_write(os.path.join(run_dir, name), 'w') as f:
                f.writelines(content)


def _lines(run_dir, name):
    try:
        return (pathlib.Path(run_dir) / name).read_text(encoding='utf-8', errors='replace').splitlines(keepends=True)
    except FileNotFoundError:
        return []
    except OSError as e:
        raise UserError(f'could not read {name} in {run_dir}: {e.strerror or e}; check its permissions') from e


def check_tensorboard():
    """Raise UserError unless the package tensorboard is installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as e:
        raise UserError('--tensorboard needs the package tensorboard; install it with `pip install tensorboard`, or '
                        'leave the flag out: stats.jsonl has the same numbers') from e


def open_writer(run_dir):
    """A TensorBoard writer for the run folder on rank 0; None on other ranks."""
    check_tensorboard()
    return torch.utils.tensorboard.SummaryWriter(run_dir) if dist.get_rank() == 0 else None


class ProgressLine:
    """Progress on a terminal: images/s and time left, rewritten at most once a second; otherwise silent."""

    def __init__(self, nimg, total_nimg):
        self.start, self.total = nimg, total_nimg
        self.began, self.shown = time.monotonic(), 0.0
        self.active = dist.get_rank() == 0 and sys.stderr.isatty()

    def show(self, nimg):
        """Rewrite the line if it is at least a second old."""
        now = time.monotonic()
        if not self.active or now < self.shown + 1:
            return
        self.shown = now
        rate = (nimg - self.start) / max(now - self.began, 1e-8)
        left = format_time((self.total - nimg) / max(rate, 1e-8))
        sys.stderr.write(f'\r  {nimg / 1000:.1f} of {self.total / 1000:g} kimg, {rate:.1f} images/s, {left} left   \r')
        sys.stderr.flush()

    def clear(self):
        """Blank the line before something else is printed."""
        if self.active and self.shown:
            sys.stderr.write('\r' + ' ' * 79 + '\r')
