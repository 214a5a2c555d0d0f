"""Writing files so that no crash, full disk or concurrent reader ever leaves or sees half of one; logs; CPU cores."""

import contextlib
import errno
import hashlib
import io
import os
import pathlib
import secrets
import signal
import sys
import tempfile
import time
import traceback

from dnnlib.errors import UserError

ABANDONED_SEC = 24 * 3600  # a temporary file this old is of a process that was killed


@contextlib.contextmanager
def atomic_write(path, mode='wb'):
    """Open a temporary file beside `path`; on a clean exit flush it to disk and rename it to `path`.

    Whatever goes wrong inside the block, `path` keeps its old content and the temporary file is
    removed.

    Raises:
        UserError: the disk is full, the folder is missing or not writable.
    """
    path = os.fspath(path)
    folder = os.path.dirname(os.path.abspath(path))
    tmp = None
    try:
        tmp = os.path.join(folder, f'.tmp-{secrets.token_hex(8)}{os.path.basename(path)[-32:]}')
        with open(tmp, mode.replace('w', 'x'), encoding=None if 'b' in mode else 'utf-8') as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
        tmp = None
        _sync_folder(folder)
    except OSError as e:
        space = '' if e.errno in (errno.EROFS, errno.EACCES, errno.EPERM) else 'free some space or '
        raise UserError(f'could not write {path}: {e.strerror or e} (nothing was changed there); '
                        f'{space}choose another folder, and run the command again') from e
    finally:
        if tmp is not None:
            with contextlib.suppress(OSError):
                os.unlink(tmp)


def _sync_folder(folder):
    """Make a rename durable; not every file system lets a folder be opened or synced."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


@contextlib.contextmanager
def sigterm_exits(code):
    """Context in which SIGTERM raises SystemExit, so that everything is cleaned up as after an error."""
    former = signal.signal(signal.SIGTERM, lambda *_: sys.exit(code))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


class Interrupted(UserError):
    """Ctrl-C. Its exit code is the shell's for that signal, 128 + 2."""

    exit_code = 130


@contextlib.contextmanager
def interruptible(kept):
    """Context that turns Ctrl-C into an `Interrupted`, a line that says what is kept on the disk."""
    try:
        yield
    except KeyboardInterrupt as e:
        raise Interrupted(f'interrupted; {kept}') from e


def escape_on_stdout():
    """Let stdout show characters that it lacks as escapes: a file name that is no UTF-8 must not end the work."""
    with contextlib.suppress(AttributeError, ValueError):  # there is none, or it is a notebook's, or closed
        if sys.stdout.errors == 'strict':
            sys.stdout.reconfigure(errors='backslashreplace')


def cpu_cores():
    """How many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def remove_temporary_files(folder, min_age_sec=0):
    """Delete what `atomic_write` left in `folder` when it was killed, if it has not changed for `min_age_sec`.

    Another process may be writing there only if that is long enough.
    """
    for path in pathlib.Path(folder).glob('.tmp-*'):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime >= min_age_sec:
                path.unlink()


def make_dirs(path):
    """Create folder `path` and its parents.

    Raises:
        UserError: the folder cannot be created (permissions, a file of that name, a full disk).
    """
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as e:
        reason = 'a file has that name' if os.path.isfile(path) else e.strerror or e
        raise UserError(f'could not create the folder {path}: {reason}; choose another one') from e


def check_writable(path, kind='a file'):
    """Raise UserError if `atomic_write` could not write `path`, before the slow part of the work; makes its folder."""
    if os.path.isdir(path):
        raise UserError(f'{path} is a folder; give the name of {kind} to write')
    if not os.path.basename(path):  # for '' and 'new-folder/'
        raise UserError(f"'{path}' names no file; give the name of {kind} to write")
    folder = os.path.dirname(os.path.abspath(path))
    make_dirs(folder)
    try:
        with tempfile.TemporaryFile(prefix='.tmp-', dir=folder):
            pass
    except OSError as e:
        raise UserError(f'cannot write files in {folder}: {e.strerror or e}; choose another folder for '
                        f'{os.path.basename(path)}') from e


def check_appendable(path):
    """Raise UserError unless lines can be appended to `path`; for use before long work."""
    folder = os.path.dirname(os.path.abspath(path))
    named = os.path.basename(path) and not os.path.isdir(path)
    if not named or not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise UserError(f'{path} cannot be written; give a file in a folder that exists and may be written to')


def file_sha256(path):
    """Hexadecimal SHA-256 of a file.

    Raises:
        UserError: it cannot be read, perhaps because it was deleted meanwhile.
    """
    digest = hashlib.sha256()
    try:
        with open(path, 'rb') as f:
            while chunk := f.read(1 << 20):
                digest.update(chunk)
    except OSError as e:
        raise UserError(f'could not read {path}: {e.strerror or e}; check that it is still there') from e
    return digest.hexdigest()


class Tee:
    """Copies everything printed to stdout and stderr, until closed: into memory, and from `open` on into a log file."""

    def __init__(self):
        self._file = io.StringIO()
        self._streams = sys.stdout, sys.stderr
        self._nowhere = open(os.devnull, 'w', encoding='utf-8')
        sys.stdout, sys.stderr = (_TeeStream(stream or self._nowhere, self, self._nowhere) for stream in self._streams)

    def open(self, path):
        """Append to a file what has been printed so far and all that follows."""
        held, self._file = self._file, open(path, 'a', encoding='utf-8', errors='replace')
        self.write(held.getvalue())

    def write(self, text):
        """Write text to the log alone."""
        with contextlib.suppress(OSError):  # if the disk is full, the writes that matter will say so
            self._file.write(text)
            self._file.flush()

    def close(self):
        """Stop copying."""
        sys.stdout, sys.stderr = self._streams
        self._file.close()
        self._nowhere.close()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        with contextlib.suppress(OSError):  # the error itself is printed later, by click or the interpreter
            if isinstance(error, UserError):
                self._file.write(f'Error: {error.message}\n')
            elif error is not None:
                traceback.print_exception(error, file=self._file)
        self.close()


class _TeeStream:
    """One duplicated stream; status lines that are rewritten in place stay out of the log."""

    def __init__(self, stream, log, nowhere):
        self._stream, self._log, self._nowhere = stream, log, nowhere

    def write(self, text):
        if '\r' not in text:
            self._log.write(text)
        with self._going_on():
            try:
                self._stream.write(text)
            except UnicodeEncodeError as e:  # a terminal that lacks a character must not end a training run
                self._stream.write(text.encode(e.encoding, 'replace').decode(e.encoding))
        return len(text)

    def flush(self):
        with self._going_on():
            self._stream.flush()

    @contextlib.contextmanager
    def _going_on(self):
        """Nor may a closed terminal, a pipe without a reader, or a full disk: from then on there is only the log."""
        try:
            yield
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(self._nowhere.fileno(), self._stream.fileno())  # what the stream still holds goes there too
            self._stream = self._nowhere

    def __getattr__(self, name):
        return getattr(self._stream, name)
