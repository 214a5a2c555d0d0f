"""Running the project's commands as a user does, on a full disk too, and reading what they refuse and record."""

import contextlib
import importlib
import json
import os
import pathlib
import resource
import signal
import socket
import subprocess
import sys

import pytest
from click.testing import CliRunner

from dnnlib import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent
READ_ONLY = '/proc' if os.path.isdir('/proc') else '/System'  # a folder in which nobody can write: Linux's, macOS's
SMALL = ['--cbase=8', '--cres=1,1', '--batch=16', '--lr-rampup=0.001', '--workers=0', '--grid=4']


def run_command(script, *args, ok=True, **kwargs):
    """Run `python SCRIPT ARGS` in one process; with `ok`, it must succeed."""
    return _run([sys.executable, str(ROOT / script), *map(str, args)], ok, **kwargs)


def torchrun(script, *args, ranks=2, ok=True, **kwargs):
    """Run `torchrun --standalone --nproc_per_node=RANKS SCRIPT ARGS`."""
    launcher = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}', '--']
    return _run([*launcher, str(ROOT / script), *map(str, args)], ok, **kwargs)


def invoke(script, *args):
    """Run `SCRIPT ARGS` in this process, which is quicker; returns click's result, with output and exit_code."""
    return CliRunner().invoke(importlib.import_module(script.removesuffix('.py')).main, [str(a) for a in args])


def succeed(script, *args):
    """`invoke`, which must succeed; returns what it printed."""
    result = invoke(script, *args)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def refused(result, *sentences):
    """Assert that a command ended with an error message that contains all `sentences`, and without a traceback."""
    assert result.exit_code != 0 and isinstance(result.exception, SystemExit), (result.output, result.exception)
    for sentence in sentences:
        assert sentence in result.output, result.output
    assert 'Traceback' not in result.output


def refusal(function, *args, **kwargs):
    """The one-line message of the UserError with which `function` must refuse its arguments."""
    with pytest.raises(UserError) as e:
        function(*args, **kwargs)
    assert '\n' not in str(e.value)
    return str(e.value)


def json_lines(path):
    """All objects in a file of JSON lines; no line may be cut off."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def free_port():
    """A TCP port that is free on this machine."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def _run(command, ok, env=None, timeout=240):
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', **(env or {})}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=timeout)
    assert not ok or done.returncode == 0, done.stdout + done.stderr
    return done


@contextlib.contextmanager
def full_disk(n):
    """Let every write beyond the first n bytes of a file fail, as on a full disk."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
        signal.signal(signal.SIGXFSZ, handler)
