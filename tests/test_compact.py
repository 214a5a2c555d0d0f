"""training.compact: states of 10 bytes per parameter, within the error bounds that they promise."""

import pytest
import torch

from tests.commands import SMALL, invoke, refused
from tests.kills import equal, final_state, losses
from training.compact import compact, expand, is_compact
from training.run_files import saved_files
from training.state import load_state, save_state

# One tick is 128 images; a state at 64, 192, …, 448 images (named 000000).
RUN = [*SMALL, '--batch=64', '--grid=0', '--dropout=0.1', '--tick=0.128', '--snap=0', '--dump=1', '--seed=3',
       '--nosubdir', '--auto-resume', '--lr-rampup=0']


def train(folder, kimg, *options):
    out = invoke('train.py', *RUN, f'--outdir={folder}', f'--duration={kimg / 1000}', *options)
    assert out.exit_code == 0, out.output
    return out.output


def some_state(n=10_000):
    """A state as Adam and the moving average leave it, of one tensor of n weights: all magnitudes, and some zeros."""
    rng = torch.Generator().manual_seed(0)
    w, drift, m = (torch.randn(n, generator=rng) * 10 ** (torch.rand(n, generator=rng) * 20 - 17) for _ in range(3))
    m[:10] = 0
    return {
        'net': {'w': w, 'table': torch.linspace(0, 1, 7), 'index': torch.arange(5)},
        'ema': {'w': w + drift, 'table': torch.linspace(0, 1, 7), 'index': torch.arange(5)},
        'optimizer': {'state': {0: {'step': torch.tensor(1234567.), 'exp_avg': m, 'exp_avg_sq': m.square()}},
                      'param_groups': [{'lr': 1e-3, 'params': [0]}]},
        'ranks': [{'random': torch.get_rng_state()}], 'progress': {'nimg': 2 ** 33 + 1},
    }


def test_errors_are_within_the_bounds():
    state = some_state()
    packed = compact(state)
    assert is_compact(packed) and not is_compact(state)
    back = expand(packed)
    w, ema, new = state['net']['w'], state['ema']['w'], back['ema']['w']
    rounding = 2 ** -24 * torch.stack([ema.abs(), new.abs(), (ema - w).abs()]).sum(0)
    assert ((new - ema).abs() <= 2 ** -8 * (ema - w).abs() + rounding).all()
    moments, packed_moments = (tree['optimizer']['state'][0] for tree in (state, back))
    for name in ('exp_avg', 'exp_avg_sq'):
        true, found = moments[name].double(), packed_moments[name].double()
        ordinary = (true == 0) | (true.abs() >= 2 ** -126)
        assert ordinary.float().mean() > 0.9 and packed_moments[name].dtype == torch.float32
        assert ((found - true).abs() <= 2 ** -8 * true.abs())[ordinary].all()
        assert (found - true).abs().max() > 0  # it is not exact
    assert (packed_moments['exp_avg_sq'] >= 0).all()
    step, new_step = (tree['exp_avg'].double() / tree['exp_avg_sq'].double().sqrt()
                      for tree in (moments, packed_moments))
    usable = moments['exp_avg_sq'] >= 2 ** -126
    assert ((new_step - step).abs() <= 0.006 * step.abs())[usable].all()


def test_everything_else_is_exact():
    state = some_state()
    back = expand(compact(state))
    assert back.keys() == state.keys()
    for key in ('net', 'ranks', 'progress'):
        assert equal(back[key], state[key])
    for name in ('table', 'index'):
        assert equal(back['ema'][name], state['ema'][name])
    assert equal(back['optimizer']['param_groups'], state['optimizer']['param_groups'])
    step = back['optimizer']['state'][0]['step']
    assert step.dtype == torch.float32 and step == 1234567  # bfloat16 would make 1236992 of it
    assert equal(state, some_state())  # what was given is left as it was


def test_ten_bytes_a_parameter(tmp_path):
    n = 500_000
    save_state(tmp_path / 'exact.pt', some_state(n))
    save_state(tmp_path / 'compact.pt', compact(some_state(n)))
    exact, packed = ((tmp_path / name).stat().st_size for name in ('exact.pt', 'compact.pt'))
    assert 16 * n < exact < 16 * n + 20_000 and 10 * n < packed < 10 * n + 20_000


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """Two runs of 448 images, one with compact states, and what they printed when they continued to 704."""
    folder = tmp_path_factory.mktemp('runs')
    said = {}
    for name, options in (('exact', []), ('compact', ['--compact-state'])):
        train(folder / name, 0.448, *options)
        said[name] = train(folder / name, 0.704)  # no option: the file says what it is
    return folder, said


def test_a_run_goes_on_from_a_compact_state(runs):
    folder, said = runs
    assert 'This state is compact' in said['compact'] and 'no longer bit for bit' in said['compact']
    assert 'compact:' not in said['exact']
    exact, close = (final_state(folder / name) for name in ('exact', 'compact'))
    assert equal(exact['progress'], close['progress'])
    assert equal(exact['ranks'][0]['random'], close['ranks'][0]['random'])
    for key in ('net', 'ema'):
        parts = [torch.cat([t.flatten() for t in state[key].values()]) for state in (exact, close)]
        assert 0 < (parts[0] - parts[1]).norm() < 1e-3 * parts[0].norm(), key
    a, b = losses(folder / 'exact'), losses(folder / 'compact')
    assert len(a) == len(b) == 6 and a[:4] == b[:4]  # up to the state the runs are the same
    for (_, one), (_, other) in zip(a[4:], b[4:]):
        assert one['mean'] != other['mean'] == pytest.approx(one['mean'], rel=0.01)


def test_the_option_decides_how_states_are_written(tmp_path):
    for options, expected in ((['--compact-state'], True), ([], False)):
        train(tmp_path / str(expected), 0.064, *options)
        path, = saved_files(tmp_path / str(expected), 'training-state')
        assert is_compact(load_state(path)) is expected


def test_a_compact_state_of_another_network_is_refused(tmp_path):
    train(tmp_path, 0.064, '--compact-state')
    path, = saved_files(tmp_path, 'training-state')
    state = load_state(path)
    name = next(iter(state['ema_difference']))
    state['ema_difference'][name] = torch.zeros(3, 5, 7, dtype=torch.bfloat16)
    save_state(path, state)
    refused(invoke('train.py', *RUN, f'--outdir={tmp_path}', '--duration=0.000128'), 'does not fit this run')
