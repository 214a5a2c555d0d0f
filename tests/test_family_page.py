"""The contact sheet of all systems: what can be said without training them."""

import numpy as np
import pytest
import torch

from tests.commands import invoke
from warm.demo import is_trained
from warm.family import COLUMNS, PAPER_SETTINGS, Counter, Result, draw_sheet, members, page
from warm.figures import draw
from warm.systems import SYSTEMS


def results():
    rng = np.random.default_rng(0)
    return [Result(member, rng.integers(0, 255, [COLUMNS, 1, 8, 8], dtype=np.uint8), 35, 1.5, 2.0)
            for member in members()]


def test_every_system_has_a_row():
    rows = list(members())
    assert {row.system for row in rows} == {name for name, system in SYSTEMS.items() if system.trainable}
    assert len({(row.run, row.sample) for row in rows}) == len(rows)


def test_members_take_their_options():
    for row in members():
        system = SYSTEMS[row.system]
        names = (*system.sample_options, *(option.name for option in system.own_sample_options))
        assert all(name in names for name, _ in row.sample)
        if row.train:
            result = invoke('train.py', f'--precond={row.system}', *row.train, '--dry-run')
            assert result.exit_code == 0, result.output


def test_page_and_sheet(tmp_path):
    text = page(results(), 1.0, 100, 0.01, 'family.png')
    for row in members():
        assert f'| {row.title} | ' in text
    rows = [(r.member.title, r.images) for r in results()]
    files = draw(str(tmp_path / 'family'), (10, 6), lambda figure: draw_sheet(figure, rows))
    assert (tmp_path / 'family.png').is_file() and len(files) == 2


@pytest.mark.parametrize('name', PAPER_SETTINGS)
def test_paper_settings_are_accepted(name):
    flags = [flag for flag in PAPER_SETTINGS[name][1].split() if not flag.startswith('--data')]
    result = invoke('train.py', f'--precond={name}', *flags, '--dry-run')
    assert result.exit_code == 0, result.output


def test_counter_counts_evaluations():
    net = SYSTEMS['edm'].network_class(8, 1, model_type='SongUNet', model_channels=8, channel_mult=[1], num_blocks=1)
    counter = Counter(net)
    SYSTEMS['edm'].make_sampler(net, {'num_steps': 3})(torch.zeros(2, 1, 8, 8))
    assert counter.calls == 5


def test_a_stopped_run_is_not_a_finished_one(tmp_path):
    """A run that was stopped leaves a snapshot too; demo and family go on with it."""
    (tmp_path / 'warm').mkdir()
    assert not is_trained(tmp_path, 'warm', 0.08)
    for kimg, done in ((14, False), (80, True)):
        (tmp_path / 'warm' / f'network-snapshot-{kimg:06d}.safetensors').touch()
        assert is_trained(tmp_path, 'warm', 0.08) == done
