"""The contact sheet of all systems: what can be tested without training them."""

import re

import numpy as np
import pytest

from tests.commands import ROOT, invoke
from training import metrics
from training.detectors import load_detector
from training.snapshot import save_snapshot
from warm import family
from warm.demo import is_trained
from warm.family import COLUMNS, PAPER_SETTINGS, Result, draw_sheet, evaluated, members, page, reals
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


def without_versions(text):
    """The page's words, less those that depend on the machine."""
    return re.sub(r'PyTorch [\d.]+ on \w+, threads: \d+', '', ' '.join(text.split()))


def test_docs_show_what_the_program_writes():
    """The page is the program's, but for line breaks, and for numbers, which are taken from the page itself."""
    text = (ROOT / 'docs' / 'family.md').read_text(encoding='utf-8')
    found = re.findall(r'^\| (.*?) \| .*? \| `.*?` \| (\d+) \| ([\d.]+) \| (\d+) s \|', text, re.M)
    numbers = {title: (int(nfe), float(score), float(seconds)) for title, nfe, score, seconds in found}
    missing = [member.title for member in members() if member.title not in numbers]
    assert not missing, f'docs/family.md has no row for {missing}; python -m warm.family trains, scores and writes it'
    written = [Result(member, None, *numbers[member.title]) for member in members()]
    duration, num, floor = (float(re.search(rf'{before}([\d.]*\d)', ' '.join(text.split()))[1])
                            for before in ('--duration=', '--num=', 'digits, scores '))
    page_now = page(written, floor, int(num), duration, 'family.png')
    assert without_versions(text) == without_versions(page_now)


def test_a_member_is_drawn_scored_and_counted(tmp_path, monkeypatch):
    """This holds for Cold Diffusion, which needs its data too, and for a variant that shares another's run."""
    detector, digits = load_detector('pixels'), reals()
    reference = metrics.accumulate([digits], detector, ['fid'], len(digits))
    for title, nfe in (('Cold Diffusion', 50), ('EDM-ES', 35)):
        member = next(row for row in members() if row.title == title)
        net = SYSTEMS[member.system].network_class(8, 1, model_type='SongUNet', model_channels=8, channel_mult=[1],
                                                   num_blocks=1)
        (tmp_path / member.run).mkdir()
        save_snapshot(tmp_path / member.run / 'network-snapshot-000001.safetensors', net, member.system,
                      dataset=dict(name='digits-8x8', resolution=8, num_images=len(digits)))
        result = evaluated(tmp_path, member, COLUMNS, detector, reference)
        assert result.nfe == nfe and result.score > 0 and result.images.shape == (COLUMNS, 1, 8, 8)
        with monkeypatch.context() as patch:  # the same again is not drawn anew, another number of images is
            patch.setattr(family, 'evaluate', None)
            again = evaluated(tmp_path, member, COLUMNS, detector, reference)
            assert (again.images == result.images).all()
            assert (again.nfe, again.score, again.seconds) == (result.nfe, result.score, result.seconds)
            with pytest.raises(TypeError):
                evaluated(tmp_path, member, COLUMNS + 1, detector, reference)


@pytest.mark.parametrize('name', PAPER_SETTINGS)
def test_paper_settings_are_accepted(name):
    flags = [flag for flag in PAPER_SETTINGS[name][1].split() if not flag.startswith('--data')]
    result = invoke('train.py', f'--precond={name}', *flags, '--dry-run')
    assert result.exit_code == 0, result.output


def test_a_stopped_run_is_not_a_finished_one(tmp_path):
    """A stopped run leaves a snapshot too; demo and family have to continue it."""
    (tmp_path / 'warm').mkdir()
    assert not is_trained(tmp_path, 'warm', 0.08)
    for kimg, done in ((14, False), (80, True)):
        (tmp_path / 'warm' / f'network-snapshot-{kimg:06d}.safetensors').touch()
        assert is_trained(tmp_path, 'warm', 0.08) == done
