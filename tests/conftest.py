"""Shared by all tests: the project's root, the recorded values, an undisturbed run, a cache folder."""

import json
import os
import pathlib
import signal
import types

# The tests' networks are small: a second thread costs more than it gains, above all on a busy machine. This must be
# set before PyTorch is imported; commands started by tests inherit it.
os.environ.setdefault('OMP_NUM_THREADS', '1')

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Shells start commands in the background with Ctrl-C ignored, which the processes of the tests would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope='session')
def root():
    """The project's root folder, where the commands are."""
    return ROOT


@pytest.fixture(scope='session')
def undisturbed(tmp_path_factory):
    """Folder of an undisturbed run of two ranks (tests.kills), to compare others with."""
    from tests import kills
    folder = tmp_path_factory.mktemp('undisturbed') / 'run'
    assert kills.wait(kills.start(folder, 2)) == 0, kills.log_of(folder)
    return folder


@pytest.fixture(scope='session')
def golden():
    """golden('warm-blur') → the arrays of tests/golden/warm-blur.npz, `meta` parsed from JSON."""
    def load(name):
        with np.load(ROOT / 'tests' / 'golden' / f'{name}.npz') as z:
            arrays = {k: z[k] for k in z.files}
        meta = json.loads(str(arrays.pop('meta')))
        return types.SimpleNamespace(meta=meta, **{k: v for k, v in arrays.items() if k.isidentifier()},
                                     arrays=arrays)
    return load


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
    """A cache folder for the module, and one thread, as in its subprocesses: their number decides the last digit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('DNNLIB_CACHE_DIR', str(tmp_path_factory.mktemp('cache')))
        yield pathlib.Path(os.environ['DNNLIB_CACHE_DIR'])
    torch.set_num_threads(threads)
