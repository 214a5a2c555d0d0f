"""Steps, samplers and scores on a pretended GPU (tests/pretended.py): no devices are mixed, the host never waits."""

import json
import subprocess
import sys

import pytest
import torch

from tests import pretended
from tests.commands import ROOT

CASES = list(pretended.cases())


@pytest.fixture(scope='module')
def results():
    """{case: what was wrong}."""
    run = subprocess.run([sys.executable, '-m', 'tests.pretended'], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.skipif(not pretended.available, reason=f'PyTorch {torch.__version__} takes no devices written in Python')
@pytest.mark.parametrize('case', CASES)
def test_on_a_pretended_gpu(case, results):
    assert results[case] == ''
