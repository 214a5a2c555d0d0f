"""Non-finite numbers: they are counted and, if they persist, end the run; the last good state remains."""

import json
import math
import types

import pytest
import torch

from dnnlib import UserError
from tests.commands import SMALL, invoke, json_lines, refused
from tests.kills import equal, final_state
from torch_utils import distributed as dist
from training import training_loop as tl
from training.health import Health
from training.loss import EDMLoss
from training.progress import Progress
from training.run_files import saved_files
from training.saving import Saver
from training.snapshot import read_snapshot
from training.state import load_state
from training.status import trim_records
from warm.report.data import read_run
from warm.report.plots import training_curves

RUN = [*SMALL, '--grid=0', '--augment=0', '--dropout=0', '--tick=0.032', '--snap=1', '--dump=1', '--seed=3',
       '--nosubdir', '--lr-rampup=0']


def train(folder, *options, steps=10):
    return invoke('train.py', *RUN, f'--outdir={folder}', f'--duration={steps * 16e-6:.6f}', *options)


def counts(folder):
    return [line['Progress/nonfinite']['mean'] for line in json_lines(folder / 'stats.jsonl')]


@pytest.fixture
def bad_steps(monkeypatch):
    """bad_steps(numbers, value) multiplies the loss of these steps by that value."""
    loss, step = EDMLoss.__call__, [0]

    def spoil(numbers, value):
        def spoilt(self, *args, **kwargs):
            step[0] += 1
            return loss(self, *args, **kwargs) * (value if step[0] in numbers else 1)
        monkeypatch.setattr(EDMLoss, '__call__', spoilt)
    return spoil


@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_single_bad_steps_are_counted_and_the_run_goes_on(value, bad_steps, tmp_path):
    bad_steps({3, 4, 6}, value)
    assert train(tmp_path, '--max-nonfinite=3').exit_code == 0
    assert counts(tmp_path)[:5] == [0, 1, 1, 1, 0]  # ticks end with the steps 1, 3, 5, 7, …
    assert all(t.isfinite().all() for t in final_state(tmp_path)['net'].values())


def test_too_many_in_a_row_end_the_run_and_the_last_good_state_stays(bad_steps, tmp_path):
    bad_steps(range(6, 1000), math.nan)
    refused(train(tmp_path, '--max-nonfinite=4', steps=40), '4 steps in a row', 'steps 6 to 9', '--max-nonfinite',
            'start again with a lower --lr, from the newest training state if there is one')
    assert final_state(tmp_path)['progress']['nimg'] == 5 * 16  # that of step 7 would have been bad
    snapshot = read_snapshot(saved_files(tmp_path, 'network-snapshot')[0])
    assert snapshot.kimg == 0.08 and all(t.isfinite().all() for t in snapshot.state_dict.values())


def test_a_run_that_explodes_is_stopped(tmp_path):
    refused(train(tmp_path, '--lr=1e30', '--max-nonfinite=3', steps=40), '3 steps in a row')
    for path in saved_files(tmp_path, 'training-state'):
        assert all(t.isfinite().all() for t in load_state(path)['net'].values()), path


def test_zero_never_stops(bad_steps, tmp_path):
    bad_steps(range(2, 1000), math.nan)
    out = train(tmp_path, '--max-nonfinite=0', '--dump=0', steps=8)
    assert out.exit_code == 0 and 'Nothing is saved' in out.output


@pytest.mark.parametrize('due', ['dump', 'snap'])
def test_what_is_due_at_a_bad_step_is_saved_one_tick_later(due, bad_steps, tmp_path, monkeypatch):
    """Not an interval later: ticks end with the steps 1, 3, 5, …, and only those of 5 and 9 are due."""
    saved, save = [], Saver.save
    monkeypatch.setattr(Saver, 'save', lambda self, nimg, snapshot, state: (
        saved.append((nimg // 16, state is not None)), save(self, nimg, snapshot, state)))
    bad_steps({5}, math.inf)
    out = train(tmp_path, *(f'--{name}={2 if name == due else 0}' for name in ('dump', 'snap')), steps=11)
    assert out.exit_code == 0 and 'Nothing is saved at 0.08 kimg, but after the next good tick' in out.output
    dumped = due == 'dump'
    assert saved == [*([] if dumped else [(1, False)]), (7, dumped), (9, dumped), (11, True)]


def test_a_run_that_ends_with_a_bad_step_is_saved(bad_steps, tmp_path):
    """There is no later step to wait for, and what a bad step leaves is finite."""
    bad_steps({6}, math.nan)
    assert train(tmp_path, '--snap=0', '--dump=0', steps=6).exit_code == 0
    assert final_state(tmp_path)['progress']['nimg'] == 6 * 16
    assert all(t.isfinite().all() for t in final_state(tmp_path)['net'].values())


def test_records_of_bad_ticks_are_json(bad_steps, tmp_path):
    """NaN, which JSON does not have, is written as null, and whatever reads the records still works."""
    bad_steps({2, 3}, math.nan)
    assert train(tmp_path, steps=5).exit_code == 0
    (tmp_path / 'stats.jsonl').write_text((tmp_path / 'stats.jsonl').read_text().splitlines(keepends=True)[0])
    trim_records(tmp_path, 2, {'Progress/tick': {'mean': 1.0}, 'Loss/loss': {'mean': math.nan}})
    assert train(tmp_path, '--auto-resume', steps=7).exit_code == 0
    for line in (tmp_path / 'stats.jsonl').read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
    stats = read_run(tmp_path).stats
    assert [line['Loss/loss']['mean'] is None for line in stats[:3]] == [False, True, False]
    loss, _ = training_curves([read_run(tmp_path)])
    assert len(loss['curves'][0]['y']) == len(stats) - 1


def test_bad_weights_are_not_saved_at_the_end():
    health, progress, net = Health(), Progress(nimg=32), torch.nn.Linear(2, 2)
    health.streak = 1
    assert tl.worth_saving(health, progress, net, leaving=True)
    assert not tl.worth_saving(health, progress, net, leaving=False)
    net.bias.data[0] = math.nan
    with pytest.raises(UserError, match='the weights are not finite'):
        tl.worth_saving(health, progress, net, leaving=True)


def test_loss_scaling_is_undone_before_anything_reads_gradients(tmp_path):
    """A power of two changes no bit of a float32's fraction, so runs with and without loss scaling are the same."""
    for scale in (1, 1024):
        assert train(tmp_path / str(scale), f'--ls={scale}', steps=5).exit_code == 0
    a, b = (final_state(tmp_path / str(scale)) for scale in (1, 1024))
    for name in ('net', 'ema', 'optimizer'):
        assert equal(a[name], b[name])


def test_clean_gradients_says_whether_all_were_finite():
    net = torch.nn.Linear(3, 2)
    for bad in (None, math.nan, math.inf, -math.inf):
        net.weight.grad, net.bias.grad = torch.full([2, 3], 1e30), torch.ones(2)
        if bad is not None:
            net.bias.grad[1] = bad
        assert tl.clean_gradients(net, 4).item() is (bad is None)
        assert net.weight.grad[0, 0] == 2.5e29 and net.bias.grad.isfinite().all()


def test_one_rank_is_enough(monkeypatch):
    """A bad number on any rank counts for all of them, and so does a rank's wish to stop."""
    others = torch.tensor([1., 1.])
    monkeypatch.setattr(dist, 'all_reduce_sum', lambda t: t.add_(others))
    health = Health(max_nonfinite=2)
    health.end_step(1, [torch.tensor(True)], False)
    assert health.streak == 1 and health.stopping
    with pytest.raises(UserError, match='2 steps in a row, steps 1 to 2'):
        health.end_step(2, [torch.tensor(True)], False)


def test_a_request_to_stop_is_not_forgotten():
    """On a GPU several steps may be read at once, of which only an earlier one carried the request."""
    health, sound = Health(), torch.tensor(True)
    health.end_step(1, [sound], True)
    health.end_step(2, [sound], False)
    assert health.stopping


@pytest.fixture
def late(monkeypatch):
    """Ballots as a GPU's: a step's numbers are on the host only after its event has been waited for."""
    def cast(self, numbers):
        arriving = torch.full_like(numbers, math.nan)
        self._under_way.append((arriving, types.SimpleNamespace(synchronize=lambda: arriving.copy_(numbers))))
    monkeypatch.setattr(dist.Ballot, 'cast', cast)


def test_a_ballot_is_read_one_step_later(late):
    ballot = dist.Ballot()
    ballot.cast(torch.tensor([1.]))
    assert list(ballot.results()) == []
    ballot.cast(torch.tensor([2.]))
    assert list(ballot.results()) == [[1.]]
    assert list(ballot.results(wait=True)) == [[2.]]


def test_steps_read_late_are_named_rightly(late):
    health = Health(max_nonfinite=2)
    for step, sound in ((1, True), (2, False), (3, False)):
        health.end_step(step, [torch.tensor(sound)], False)
    assert health.streak == 1  # step 3 is not read yet
    with pytest.raises(UserError, match='2 steps in a row, steps 2 to 3'):
        health.settle()


def test_bad_steps_before_a_resume_within_the_tick_count():
    health = Health(count=3)
    health.end_step(1, [torch.tensor(False)], False)
    assert health.count == 4


@pytest.mark.parametrize('finite, bad', [([True, True], 0), ([True, False], 1), ([False, False], 1)])
def test_a_bad_step_counts_once(finite, bad, monkeypatch):
    """However many of its losses and gradients were bad, and on however many ranks (here two alike)."""
    monkeypatch.setattr(dist, 'all_reduce_sum', lambda t: t.mul_(2))
    health = Health()
    health.end_step(1, [torch.tensor(f) for f in finite], False)
    assert health.count == health.streak == bad
