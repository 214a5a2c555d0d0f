"""Running the project's commands as a user does, on a full disk too; what they refuse and what they record."""

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
SMALL = ['--cbase=8', '--cres=1,1', '--batch=16', '--lr-rampup=0.001', '--workers=0', '--grid=4']


def run_command(script, *args, ok=True, **kwargs):
    """`python SCRIPT ARGS` in one process; with `ok` it must succeed."""
    return _run([sys.executable, str(ROOT / script), *map(str, args)], ok, **kwargs)


def torchrun(script, *args, ranks=2, ok=True, **kwargs):
    """`torchrun --standalone --nproc_per_node=RANKS SCRIPT ARGS`."""
    launcher = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}', '--']
    return _run([*launcher, str(ROOT / script), *map(str, args)], ok, **kwargs)


def invoke(script, *args):
    """The same in this process, which is quicker: for commands that should end early. Gives output, exit_code."""
    return CliRunner().invoke(importlib.import_module(script.removesuffix('.py')).main, [str(a) for a in args])


def succeed(script, *args):
    """`invoke`, which must succeed; returns what it printed."""
    result = invoke(script, *args)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def refused(result, *sentences):
    """Assert that a command ended with one error message holding all `sentences`, and without a traceback."""
    assert result.exit_code != 0 and isinstance(result.exception, SystemExit), (result.output, result.exception)
    for sentence in sentences:
        assert sentence in result.output, result.output
    assert 'Traceback' not in result.output


def refusal(function, *args, **kwargs):
    """The sentence, of one line, with which a function refuses what it is given."""
    with pytest.raises(UserError) as e:
        function(*args, **kwargs)
    assert '\n' not in str(e.value)
    return str(e.value)


def json_lines(path):
    """Everything in a file of JSON lines, all of which must be whole."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def free_port():
    """Of this machine."""
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
    """Within it, a write beyond n bytes of a file fails as on a full disk."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
        signal.signal(signal.SIGXFSZ, handler)
