"""Snapshots and training states of a run: when to save, writing in the background, deleting old ones, finding them."""

import contextlib
import os
import pathlib
import queue
import threading

import torch

from dnnlib import UserError
from training.progress import load_run_state
from training.run_files import SNAPSHOT, STATE, parse_kimg, saved_files, saved_path
from training.snapshot import read_snapshot, write_snapshot
from training.state import load_state, save_state

MAX_WAITING = 2  # saves that may queue for the disk; beyond that training waits, since memory would fill up
LEAVE_SEC = 60  # how long leaving the `with` block, as after an error elsewhere, waits for pending writes
READERS = {STATE: load_state, SNAPSHOT: read_snapshot}
LATEST = 'latest'


# -- when to save

class SaveSchedule:
    """What is due to be saved. What is due at a bad step is not saved then and stays due, until `saved` is called.

    Args:
        snapshot_ticks, state_dump_ticks: Intervals of snapshots and of training states; 0: only at the end.

    Attributes:
        snapshot_due, dump_due: Whether a snapshot, and a training state, are due; with a state always a snapshot.
    """

    def __init__(self, snapshot_ticks, state_dump_ticks):
        self.snapshot_ticks, self.state_dump_ticks = snapshot_ticks, state_dump_ticks
        self.saved()

    def update(self, tick, leaving):
        """Note what the end of a tick makes due; when leaving, both. Tick 0, of a single step, makes no state due."""
        if leaving or (tick != 0 and _is_due(tick, self.state_dump_ticks)):
            self.dump_due = True
        if self.dump_due or _is_due(tick, self.snapshot_ticks):
            self.snapshot_due = True

    def saved(self):
        """All that was due is saved."""
        self.snapshot_due = self.dump_due = False


def _is_due(tick, interval):
    return bool(interval) and tick % interval == 0


# -- writing

class Saver:
    """Writes a run's snapshots and states in a background thread, in the order given; needed on rank 0 only.

    The caller waits only for the copy to host memory. After each save, files beyond `keep` are deleted, once the newest
    has been read back from disk. Leaving the `with` block waits up to LEAVE_SEC for pending writes.

    Args:
        run_dir: Folder of the run.
        keep: Number of snapshots, and of states, to keep; 0 keeps all.
        pack: Applied to a state before it is written, such as `training.compact.compact`.
    """

    def __init__(self, run_dir, keep=0, pack=None):
        self.run_dir, self.keep, self.pack = run_dir, keep, pack
        self._jobs = queue.Queue(MAX_WAITING)
        self._thread = None
        self._error = None

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        if self._thread is not None:
            with contextlib.suppress(queue.Full):
                self._jobs.put(None, timeout=LEAVE_SEC)
            self._thread.join(LEAVE_SEC)

    def save(self, nimg, snapshot=None, state=None):
        """Write network-snapshot-KIMG and training-state-KIMG, whichever is given.

        Args:
            snapshot: Arguments of `write_snapshot` except the path. Tensors are copied, so they may change afterwards.
            state: As for `save_state`; a tensor in both is copied once.
        """
        snapshot, state = host_copy((snapshot, state))
        self._put(lambda: self._write(nimg, snapshot, state))

    def check(self):
        """Raise the error of an earlier save, if one failed."""
        if self._error is not None:
            raise self._error

    def finish(self):
        """Wait until everything is written, then `check`."""
        self._jobs.join()
        self.check()

    def _put(self, job):
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name='saver', daemon=True)
            self._thread.start()
        self._jobs.put(job)

    def _work(self):
        while job := self._jobs.get():
            try:
                if self._error is None:
                    job()
            except Exception as e:  # re-raised by `check` in the training thread
                self._error = e
            finally:
                self._jobs.task_done()

    def _write(self, nimg, snapshot, state):
        if snapshot is not None:
            write_snapshot(saved_path(self.run_dir, SNAPSHOT, nimg), **snapshot)
        if state is not None:
            save_state(saved_path(self.run_dir, STATE, nimg), self.pack(state) if self.pack else state)
        if self.keep:
            prune(self.run_dir, self.keep, nimg)


def host_copy(tree, copies=None):
    """A tree of dicts, lists and tuples with each tensor copied to CPU memory; shared tensors are copied once.

    Args:
        copies: {id of a tensor: (the tensor, kept so that its id stays valid; its copy)}, for internal use. A nested
            function would be shorter, but its reference cycle would keep all copies alive until garbage collection.
    """
    copies = {} if copies is None else copies
    if isinstance(tree, dict):
        return {key: host_copy(item, copies) for key, item in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(host_copy(item, copies) for item in tree)
    if isinstance(tree, torch.Tensor):
        if id(tree) not in copies:
            copies[id(tree)] = tree, tree.detach().to('cpu', copy=True, memory_format=torch.contiguous_format)
        return copies[id(tree)][1]
    return tree


def prune(run_dir, keep, nimg):
    """Keep the newest `keep` snapshots and states up to `nimg` and delete older ones, if the newest can be read.

    Files beyond `nimg`, left over if the run was resumed from an earlier state, are not counted and stay.
    """
    for kind, read in READERS.items():
        files = [path for path in saved_files(run_dir, kind) if parse_kimg(path) <= nimg // 1000]
        if len(files) <= keep:
            continue
        try:
            read(files[0])
        except UserError as e:
            print(f'No older files are deleted, since the newest cannot be read: {e}')
            continue
        for path in files[keep:]:
            with contextlib.suppress(OSError):  # on a shared disk, say; the next save tries again
                path.unlink()


# -- finding

def find_states(where, outdir):
    """The states that `--resume=WHERE` can mean, newest first: a file, a run folder's, or the latest run's.

    Raises:
        UserError: there is none.
    """
    if os.path.isfile(where):
        return [pathlib.Path(where)]
    if os.path.isdir(where):
        folder = where
    elif where == LATEST:
        folders = [outdir, *(entry.path for entry in os.scandir(outdir) if entry.is_dir())] \
            if os.path.isdir(outdir) else []
        newest = max((path for f in folders for path in saved_files(f, STATE)[:1]),
                     key=os.path.getmtime, default=None)
        if newest is None:
            raise UserError(f'--resume={LATEST} found no training state in the run folders of {outdir}; '
                            'check --outdir, or leave --resume out')
        folder = newest.parent
    else:
        raise UserError(f'there is no training state or run folder {where}; check --resume')
    states = saved_files(folder, STATE)
    if not states:
        raise UserError(f'there is no training-state-*.pt in {folder}; resume from another run')
    return states


def newest_good(states):
    """(path, content, complaints): the first readable state, else None twice; what is wrong with those before it."""
    complaints = []
    for path in states:
        try:
            return path, load_run_state(path), complaints
        except UserError as e:
            complaints.append(str(e))
    return None, None, complaints
