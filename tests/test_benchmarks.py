"""The benchmarks' own numbers and rules (tests/benchmarks): what they count, what they compare, when they refuse."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner

from tests.benchmarks import gpu_all
from tests.commands import ROOT
from training.provenance import COMMIT_VARIABLE, code_version

CLI = CliRunner()


# -- which commit

def test_the_commit_of_a_copy_without_git(tmp_path, monkeypatch):
    """The variable tells it there, and nowhere else."""
    for folder in ('dnnlib', 'torch_utils', 'training'):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns('__pycache__'))

    def version():
        code = 'from training.provenance import code_version; print(code_version())'
        return subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True,
                              check=True).stdout.strip()
    monkeypatch.delenv(COMMIT_VARIABLE, raising=False)
    here = code_version()
    assert version() == 'None'
    monkeypatch.setenv(COMMIT_VARIABLE, 'v1-2-gabc')
    assert version() == 'v1-2-gabc'
    if (ROOT / '.git').exists():
        assert code_version() == here


def test_nothing_is_measured_on_a_gpu_without_a_commit(tmp_path, monkeypatch):
    """Otherwise --commit reaches all that is started, and the report."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(gpu_all, 'environment', lambda device: dict(commit=gpu_all.os.environ.get(COMMIT_VARIABLE)))
    monkeypatch.setattr(gpu_all, 'run_one', lambda command, limit: dict(
        rc=0, output=gpu_all.os.environ[COMMIT_VARIABLE]))
    monkeypatch.setenv(COMMIT_VARIABLE, '')
    out = tmp_path / 'gpu.json'
    refused = CLI.invoke(gpu_all.main, [f'--out={out}'])
    assert refused.exit_code == 1 and '--commit=REV' in refused.output and not out.exists()
    assert CLI.invoke(gpu_all.main, [f'--out={out}', '--commit=abc']).exit_code == 0
    content = json.loads(out.read_text())
    assert content['environment'] == dict(commit='abc')
    assert {run['output'] for run in content['runs'].values()} == {'abc'}
