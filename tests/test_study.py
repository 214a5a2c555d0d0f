"""warm.study: the plan is complete, a study continues where it stopped, and the page says what the numbers say."""

import dataclasses
import errno
import functools
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import scipy.special
import torch
from click.testing import CliRunner

from tests.commands import ROOT, invoke, json_lines, refusal
from training.dataset import EMBEDDED
from warm.study import answers as study_answers
from warm.study import page as study_page
from warm.study import pieces as study_pieces
from warm.study import plan as study_plan
from warm.study import run as study_command
from warm.study import work as study
from warm.study.data import Scores, compare, shown
from warm.study.plan import (CHOICES, PAPER_BNRS, QUESTIONS, REAL, REAL_DRAWS, SCALES, bnr_name, choice_name, plan,
                             run_name)

CLI = CliRunner()
TINY = dict(main=(2, 4), side=2, transfer=(2,), main_seeds=(0,), side_seeds=(0,), num=16, batch=16,
            train=('--cbase=8', '--cres=1,1', '--batch=64', '--workers=0', '--grid=0'))


@pytest.fixture
def tiny(monkeypatch):
    """The digits' scale, made small: every training takes two starts of train.py, of seconds each."""
    scale = dataclasses.replace(SCALES['digits'], **TINY)
    monkeypatch.setitem(SCALES, 'digits', scale)
    monkeypatch.setattr(study_plan, 'SOLVERS', {'heun': (5, 18), 'euler': (), 'dpmpp2m': (9,)})
    return scale


@pytest.fixture
def short(tiny, monkeypatch):
    """`tiny` with one start per training."""
    scale = dataclasses.replace(tiny, main=(2,))
    monkeypatch.setitem(SCALES, 'digits', scale)
    return scale


def carry_out(folder, *options):
    return CLI.invoke(study_command.main, ['--scale=digits', f'--outdir={folder / "runs"}',
                                           f'--results={folder / "results"}', *options])


def records(folder):
    return [line for line in lines_of(folder) if line['run'] != REAL]


def lines_of(folder):
    path = folder / 'results' / 'digits.jsonl'
    return json_lines(path) if path.exists() else []


# -- the plan

@pytest.mark.parametrize('scale', SCALES.values(), ids=list(SCALES))
def test_plan(scale):
    """Every run is planned once, parents come before children, and every network that is scored is saved."""
    runs = plan(scale)
    names = [run.name for run in runs]
    assert len(set(names)) == len(names)
    assert scale.side in scale.main and set(scale.side_seeds) <= set(scale.main_seeds)
    for i, run in enumerate(runs):
        assert run.parent is None or run.parent in names[:i]
        assert len(set(run.scores)) == len(run.scores)
        for score in run.scores:
            steps = score.kimg / run.kimg_between
            assert steps == pytest.approx(round(steps))


@pytest.mark.parametrize('run', [run for run in plan(SCALES['digits']) if run.seed == 0], ids=lambda run: run.name)
def test_the_flags_of_every_run_are_flags(run):
    out = invoke('train.py', *SCALES['digits'].train, *run.flags, '-n')
    assert out.exit_code == 0, out.output


def test_every_row_of_the_paper_is_asked():
    """The plan has Table 3's BNRs, by separate networks and by one, Table 5, and every alternative to our choices."""
    scale = SCALES['cifar10']
    names = {run.name: run for run in plan(scale)}
    assert list(names)[:4] == ['edm-uncond-s0', 'warm-uncond-s0', 'edm-cond-s0', 'warm-cond-s0']
    assert [bnr_name(bnr) for bnr in PAPER_BNRS] == ['edm', 'warm-bnr0.1', 'warm-bnr0.3', 'warm', 'warm-bnr0.65',
                                                     'warm-bnr1', 'warm-bnr2', 'warm-bnr10']  # as recorded in results/
    for bnr in PAPER_BNRS:
        own = run_name(bnr_name(bnr))
        assert any(score.kimg == scale.side and not score.options for score in names[own].scores)
        assert any(('bnr', f'{bnr:g}') in score.options for score in names[run_name('warm-all')].scores)
    assert all(run_name(f'warm-{targets}') in names for targets in ('clean', 'blurred', 'clean-blurred'))
    assert all(run_name(choice_name(f'{flag}={value}')) in names for flag, (_, values) in CHOICES.items()
               for value in values)


def test_the_choices_are_the_systems_defaults():
    """What the plan calls our choice is what train.py does without the flag."""
    plain = invoke('train.py', '--precond=warm', '--bnr=0.5', '--cbase=8', '--seed=0', '-n').output
    for flag, (chosen, _) in CHOICES.items():
        assert invoke('train.py', '--precond=warm', '--bnr=0.5', '--cbase=8', '--seed=0', f'{flag}={chosen}',
                      '-n').output == plain, flag


# -- carrying it out

def test_a_name_that_no_run_has(tmp_path):
    for options in ([], ['-n']):
        result = carry_out(tmp_path / 'none', '--questions=1', '--only=zzz', *options)
        assert result.exit_code == 1 and 'no run of these questions has --only=zzz in its name' in result.output
    assert not (tmp_path / 'none').exists()


def test_a_study_in_pieces(short, tmp_path, monkeypatch):
    """Stopped while a training starts and run again, it has the numbers of one without a stop, each of them once."""
    options = ('--questions=1', '--only=edm-cond')
    whole = carry_out(tmp_path / 'whole', *options)
    assert whole.exit_code == 0, whole.output
    monkeypatch.setattr(study, 'SAVE_SEC', 0)
    pieces = tmp_path / 'pieces'
    stopped = carry_out(pieces, *options, '--minutes=0.02')  # Python has not started training by then
    assert stopped.exit_code == 0 and 'Time is up' in stopped.output and not records(pieces)
    again = carry_out(pieces, *options)
    assert again.exit_code == 0, again.output

    def numbers(folder):
        return {(r['run'], r['point'], str(r['options']), r['metric']): r['value'] for r in records(folder)}
    assert numbers(pieces) == numbers(tmp_path / 'whole')
    done = len(records(pieces))
    assert carry_out(pieces, *options).exit_code == 0 and len(records(pieces)) == done  # nothing is done twice
    record = records(pieces)[0]
    assert record['run'] == 'edm-cond-s0' and record['metric'] == 'FD-pixels' and record['num_images'] == 16
    real = [r for r in lines_of(pieces) if r['run'] == REAL]
    assert [r['seed'] for r in real] == list(range(REAL_DRAWS)) and len({r['value'] for r in real}) == REAL_DRAWS
    assert all(r['num_images'] == 16 and not pathlib.Path(r['images']).is_absolute() for r in real)
    assert record['train_seconds'] > 0 and record['parameters'] > 1000 and record['nfe'] == 35
    here = study.Study(short, pieces, pieces / 'results' / 'digits.jsonl', study_pieces.Clock())
    assert study.recorded_speed(here) == pytest.approx(record['seconds'] / 16 / 35) and record['seconds'] > 0


def test_errors_of_networks_are_recorded(short, tmp_path, monkeypatch):
    """Once for each network, also of runs that were scored before; a new network counts anew; the page shows them."""
    options, file = ('--questions=1', '--only=warm-cond'), tmp_path / 'results' / 'errors-digits.jsonl'
    assert carry_out(tmp_path, *options).exit_code == 0 and not file.exists()
    monkeypatch.setitem(SCALES, 'digits', scale := dataclasses.replace(short, unseen=str(EMBEDDED)))
    monkeypatch.setattr(study, 'ERROR_IMAGES', 20)
    for _ in range(2):
        out = carry_out(tmp_path, *options)
        assert out.exit_code == 0, out.output
    recorded, = json_lines(file)
    assert recorded['run'] == 'warm-cond-s0' and recorded['point'] == 2 and recorded['num_images'] == 20
    assert recorded['bnr'] == 0.5 and recorded['data'] == 'digits-8x8' and recorded['label_dim'] == 10
    recorded['run'] = 'warm-uncond-s0'
    for again in ({'network_sha256': 'of another network'}, {}):
        file.write_text(''.join(json.dumps({**line, **again}) + '\n' for line in json_lines(file)))
        assert carry_out(tmp_path, *options).exit_code == 0
        assert len(json_lines(file)) == 2
    file.write_text(json.dumps({'a line': 'of something else'}) + '\n' + json.dumps(recorded) + '\n')
    scored = dict(line('warm-uncond-s0', 2, 1.0), num_images=scale.num)
    (tmp_path / 'results' / 'digits.jsonl').write_text(json.dumps(scored) + '\n')
    text = study_page.page(tmp_path / 'results', study_page.Figures(tmp_path))
    own, linear = next(level['R'] for level in recorded['levels'] if level['beta'] == 2)
    row, = [row for row in text.splitlines() if row.startswith('| Warm, BNR 0.5, 2 kimg |')]
    assert row.split('|')[8].strip() == f'{own / linear:.3g}' and (tmp_path / 'results-digits-errors.png').exists()


def test_errors_come_before_the_scores(short, tmp_path, monkeypatch):
    """Tidying deletes a network once it is scored: its errors are recorded by then, wherever the time runs out."""
    monkeypatch.setitem(SCALES, 'digits', dataclasses.replace(short, unseen=str(EMBEDDED)))
    monkeypatch.setattr(study, 'ERROR_IMAGES', 20)

    def time_is_up(*_):
        raise study_pieces.OutOfTime
    monkeypatch.setattr(study, 'measure', time_is_up)
    out = carry_out(tmp_path, '--questions=1', '--only=edm-cond', '--tidy')
    assert out.exit_code == 0 and 'Time is up' in out.output and not records(tmp_path)
    recorded, = json_lines(tmp_path / 'results' / 'errors-digits.jsonl')
    assert recorded['run'] == 'edm-cond-s0' and recorded['point'] == 2


def test_an_unfinished_study_is_small(tiny, tmp_path, monkeypatch):
    """With --tidy, a run that is out of time leaves a single state; what another worker is at stays untouched."""
    options = ('--questions=1', '--only=edm-cond', '--tidy')
    train, folder = study.train, tmp_path / 'runs' / 'digits' / 'edm-cond-s0'

    def out_of_time(study_, run, kimg, lock):
        if kimg == 4:
            raise study_pieces.OutOfTime
        train(study_, run, kimg, lock)

    def large():
        return sorted(path.suffix for path in folder.rglob('*') if path.suffix in ('.safetensors', '.pt'))
    with monkeypatch.context() as patch:
        patch.setattr(study, 'train', out_of_time)
        assert 'Time is up' in carry_out(tmp_path, *options).output
    assert [r['point'] for r in records(tmp_path)] == [2] and large() == ['.pt']
    (folder / 'network-snapshot-000009.safetensors').touch()
    with study_pieces.claimed(folder / 'lock'):
        assert carry_out(tmp_path, *options).exit_code == 0 and len(large()) == 2
    result = carry_out(tmp_path, *options)
    assert result.exit_code == 0 and [r['point'] for r in records(tmp_path)] == [2, 4] and large() == []
    assert [r['kimg'] for r in records(tmp_path)] == pytest.approx([2, 4], abs=0.064)


def test_tidying_leaves_a_network_that_is_not_scored(tiny, tmp_path):
    """It stays even if its training ended just as the time ran out, so that nobody has put it aside."""
    run = next(run for run in plan(tiny) if run.name == 'edm-cond-s0')
    here = study.Study(tiny, tmp_path, tmp_path / 'digits.jsonl', study_pieces.Clock())
    folder = here.folder(run.name)
    folder.mkdir()
    for kimg in (1, 4):
        (folder / f'network-snapshot-{kimg:06d}.safetensors').touch()
    study.tidy(here, [run])
    assert [p.name for p in folder.rglob('*.safetensors')] == ['network-snapshot-000004.safetensors']
    assert here.snapshot(run.name, 4) is not None


def test_the_speed_of_scoring_is_known_from_the_records(tmp_path):
    """It is that of the last score on this machine, in whichever piece or run."""
    here = study.Study(SCALES['digits'], tmp_path, tmp_path / 'digits.jsonl', study_pieces.Clock())
    scored = dict(hardware=study.hardware(), num_images=16, nfe=35)
    lines = [dict(scored, seconds=9.0), dict(scored, seconds=7.0),
             dict(scored, seconds=5.0, hardware='another machine')]
    here.results.write_text(''.join(json.dumps(x) + '\n' for x in lines))
    assert study.recorded_speed(here) == pytest.approx(7 / 16 / 35)
    here.results.write_text(json.dumps(lines[-1]) + '\n')
    assert study.recorded_speed(here) == 0


def test_transfer_waits_for_its_parent_and_tidy_keeps_it(short, tmp_path):
    """The parent's network stays until its children are measured; then nothing large is left."""
    def large():
        return {p.parent.parent.name for p in runs.rglob('*') if p.suffix in ('.safetensors', '.pt')}
    runs = tmp_path / 'runs' / 'digits'
    waiting = carry_out(tmp_path, '--questions=6')
    assert waiting.exit_code == 0 and not records(tmp_path) and '(waits for edm-uncond-s0)' in waiting.output
    options = ('--questions=1,6', '--only=edm-uncond', '--tidy')  # the parent and one of its two children
    first = carry_out(tmp_path, *options)
    assert first.exit_code == 0 and large() == {'edm-uncond-s0'}, first.output
    assert {r['run']: r['parent'] for r in records(tmp_path)} == {'edm-uncond-s0': None,
                                                                 'transfer-edm-uncond-s0': 'edm-uncond-s0'}
    second = carry_out(tmp_path, '--questions=6', '--tidy')
    assert second.exit_code == 0 and 'transfer-uncond-s0' in {r['run'] for r in records(tmp_path)}, second.output
    assert carry_out(tmp_path, *options).exit_code == 0 and large() == set()
    assert (runs / 'edm-uncond-s0' / 'stats.jsonl').exists()


def test_two_ranks_train(short, tmp_path):
    """--gpus starts torchrun; the run's log tells of its two processes."""
    result = carry_out(tmp_path, '--questions=1', '--only=edm-cond', '--gpus=2')
    assert result.exit_code == 0 and len(records(tmp_path)) == 1, result.output
    assert 'Number of processes:     2' in (tmp_path / 'runs' / 'digits' / 'edm-cond-s0' / 'log.txt').read_text()


class Corners(torch.nn.Module):
    """A detector of another kind: the colours of two pixels in the corner."""

    def forward(self, img: torch.Tensor, return_features: bool = False, no_output_bias: bool = False) -> torch.Tensor:
        return img[:, :, :2, 0].flatten(1).float() / 255


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_another_detector_has_a_file_and_a_section_of_its_own(short, tmp_path):
    detector = tmp_path / 'corners.pt'
    torch.jit.script(Corners()).save(str(detector))
    result = carry_out(tmp_path, '--questions=1', '--only=edm-cond', f'--detector={detector}')
    assert result.exit_code == 0 and not records(tmp_path), result.output
    assert {line['metric'] for line in json_lines(tmp_path / 'results' / 'digits--corners.jsonl')} == {'FD-corners'}
    text = study_page.page(tmp_path / 'results', study_page.Figures(tmp_path))
    assert f'## {short.title}, FD-corners' in text


def test_a_run_is_one_workers_at_a_time(short, tmp_path, monkeypatch):
    def begun(*args):
        raise study_pieces.OutOfTime
    monkeypatch.setattr(study, 'train', begun)
    folder = tmp_path / 'runs' / 'digits' / 'edm-cond-s0'
    folder.mkdir(parents=True)
    with study_pieces.claimed(folder / 'lock') as mine:
        assert mine
        result = carry_out(tmp_path, '--questions=1', '--only=edm-cond')
        assert result.exit_code == 0 and 'Time is up' not in result.output
    assert 'Time is up' in carry_out(tmp_path, '--questions=1', '--only=edm-cond').output


def test_a_training_keeps_the_lock_of_a_killed_worker(tmp_path):
    with study_pieces.claimed(tmp_path / 'lock') as lock:
        child = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE, pass_fds=[lock.fileno()])
    with child:
        with study_pieces.claimed(tmp_path / 'lock') as lock:
            assert lock is None
        child.communicate(b'\n')
    with study_pieces.claimed(tmp_path / 'lock') as lock:
        assert lock is not None


def test_a_disk_without_locks_is_named(tmp_path, monkeypatch):
    """Such as Lustre, unless it is mounted with them."""
    def flock(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    monkeypatch.setattr(study_pieces.fcntl, 'flock', flock)
    said = refusal(study_pieces.claimed(tmp_path / 'lock').__enter__)
    assert f'could not lock {tmp_path}/lock: Function not implemented; choose an --outdir on a disk with' in said


def test_no_piece_starts_a_training_that_it_cannot_use(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(SCALES, 'digits', dataclasses.replace(tiny, start_sec=600))
    result = carry_out(tmp_path, '--questions=1', '--only=edm-cond', '--minutes=5')
    assert result.exit_code == 0 and 'Time is up' in result.output and 'train.py' not in result.output


@pytest.mark.skipif(not (ROOT / '.git').exists(), reason='not a git checkout')
def test_a_study_does_not_make_its_own_code_dirty(tmp_path):
    """It writes its results into the repository, and the commit that its records name must stay clean."""
    subprocess.run(['git', 'clone', '-q', str(ROOT), str(tmp_path / 'clone')], check=True)

    def version():
        code = 'from training.provenance import code_version; print(code_version())'
        return subprocess.run([sys.executable, '-c', code], cwd=tmp_path / 'clone', capture_output=True, text=True,
                              check=True).stdout.strip()
    clean = version()
    for name, dirt in (('results/digits.jsonl', ''), ('train.py', '-dirty')):
        with open(tmp_path / 'clone' / name, 'a') as f:
            f.write('\n')
        assert version() == clean + dirt


@pytest.mark.parametrize('options, words', [
    (['--scale=cifar10'], 'datasets/cifar10-32x32.zip is missing; make it with --prepare, or by hand: `python data'),
    (['--scale=digits', '--questions=7'], "no question '7'")])
def test_bad_input(tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    result = CLI.invoke(study_command.main, options)
    assert result.exit_code == 1 and words in result.output and list(tmp_path.iterdir()) == []


def test_preparing_makes_what_is_missing(tiny, tmp_path, monkeypatch):
    """--prepare runs the commands once; one that fails is named."""
    dest = tmp_path / 'digits.zip'
    command = f'python dataset_tool.py --source={EMBEDDED} --dest={dest} --max-images=200'
    monkeypatch.setitem(SCALES, 'digits', dataclasses.replace(tiny, prepare=(command,), data=str(dest), main=(2,)))
    options = ('--questions=1', '--only=edm-cond', '--prepare')
    first = carry_out(tmp_path, *options)
    assert first.exit_code == 0 and command in first.output, first.output
    assert records(tmp_path)[0]['dataset'] == 'digits'
    assert command not in carry_out(tmp_path, *options).output
    dest.unlink()
    monkeypatch.setitem(SCALES, 'digits', dataclasses.replace(tiny, prepare=(f'{command} --no-such-option',)))
    failed = carry_out(tmp_path, *options)
    assert failed.exit_code == 1 and 'failed with exit code 2' in failed.output


def test_a_failed_training_is_said(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(SCALES, 'digits', dataclasses.replace(tiny, train=(*tiny.train, '--batch=0')))
    result = carry_out(tmp_path, '--questions=1', '--only=edm-cond')
    assert result.exit_code == 1 and 'the training edm-cond-s0 failed with exit code 2' in result.output


# -- the page

def line(run, point, value, seed=0, options=()):
    return dict(run=run, seed=seed, point=point, options=[list(pair) for pair in options], metric='FD-pixels',
                value=value, num_images=SCALES['digits'].num, train_seconds=10.0, parameters=900_000, hardware='CPU',
                torch='2', commit='abc')


def test_differences_are_decided_by_seeds():
    """By Student's paired t-test; one seed decides nothing."""
    better = compare({0: 1.0, 1: 1.1, 2: 1.05}, {0: 2.0, 1: 2.0, 2: 2.1})
    assert better.verdict == 'better' and better.mean == pytest.approx(-0.98333, abs=1e-4)
    assert str(better).startswith('-0.983 ± 0.076 (-48%)')
    assert compare({0: 1.0, 1: 2.0}, {0: 1.5, 1: 1.5}).verdict == 'undecided'
    assert compare({0: 3.0, 1: 3.1, 2: 3.0}, {0: 2.0, 1: 2.0, 2: 2.1}).verdict == 'worse'
    # More than two standard errors, which two seeds exceed by chance three times in ten.
    assert compare({0: 1.0, 1: 1.1}, {0: 2.0, 1: 2.5}).verdict == 'undecided'
    assert compare({0: 1.0}, {0: 2.0}).verdict == 'undecided (one seed)'
    assert compare({1: 1.0}, {0: 2.0}) is None
    assert better.margin == pytest.approx(4.302653 * 0.0763763 / 3 ** 0.5, rel=1e-5)
    assert shown({0: 1.0, 1: 3.0}) == '2 ± 1.4 (2)' and shown({}) == '–'


def test_page_from_numbers(tmp_path):
    """Numbers land in their cells; of two lines for a score the last counts; other numbers of images are left out."""
    lines = [line(run_name(name, seed=s), k, v + s / 100, s) for s in (0, 1, 2)
             for name, k, v in (('edm', 80, 1.0), ('warm', 80, 0.5), ('edm', 40, 2.0), ('warm', 40, 3.0),
                               ('warm-rest-loss-unit', 80, 1.5))]
    lines += [line('edm-uncond-s0', 80, 9.0), line('edm-uncond-s0', 80, 1.0)]
    lines += [dict(line('edm-uncond-s0', 80, 77.0), num_images=5)]
    lines += [line('warm-uncond-s0', 80, 0.25, options=[('num_steps', 18), ('solver', 'dpmpp2m')])]
    (tmp_path / 'digits.jsonl').write_text(''.join(json.dumps(x) + '\n' for x in lines))
    scores = Scores.read(SCALES['digits'], tmp_path / 'digits.jsonl')
    assert scores.values('edm', 80) == {0: 1.0, 1: 1.01, 2: 1.02}
    (tmp_path / 'notes.md').write_text('By hand.\n')
    (tmp_path / 'notes-digits.md').write_text('About the digits.\n')
    text = study_page.page(tmp_path, study_page.Figures(tmp_path))
    rows = [[cell.strip() for cell in row.strip('|').split('|')] for row in text.splitlines() if row.startswith('|')]
    assert next(row for row in rows if row[0] == 'unconditional, 80 kimg')[1:] == [
        '1.01 ± 0.01 (3)', '0.51 ± 0.01 (3)', '-0.5 ± 0 (-50%)', 'better',
        '1.51 ± 0.01 (3)', '+0.5 ± 0 (+50%)', 'worse']
    assert next(row for row in rows if row[0] == 'unconditional, 40 kimg')[4] == 'worse'
    assert text.index('By hand.') < text.index('## The embedded digits') < text.index('About the digits.')
    assert '2M with 18 evaluations 0.25, Heun with 35 0.5.' in text
    assert 'Nothing is measured yet' in text and (tmp_path / 'results-digits-main.png').exists()


def test_all_pairs_together(tmp_path):
    """Ratios at the end of training over seeds, with labels or not; the values are scipy.stats' and statsmodels'."""
    def sentence(warm):
        lines = [line(run_name('edm', cond, seed), kimg, 2.0, seed)
                 for cond, seed, kimg in ((False, 0, 40), (False, 0, 80), (False, 1, 40), (True, 0, 20))]
        lines += [line(run_name('warm', cond, seed), kimg, value, seed) for cond, seed, kimg, value in warm]
        (tmp_path / 'digits.jsonl').write_text(''.join(json.dumps(x) + '\n' for x in lines))
        return study_answers.together(Scores.read(SCALES['digits'], tmp_path / 'digits.jsonl'))
    assert sentence([(False, 0, 80, 1.9)]) == [] and sentence([(False, 2, 80, 1.9)]) == []
    text, = sentence([(False, 0, 40, 9.0), (False, 0, 80, 1.9), (False, 1, 40, 2.0), (True, 0, 20, 2.1)])
    assert text.startswith('Warm, BNR 0.5: all 3 pairs of runs together, each at the last score that both have, after '
                           "20 kimg to 80 kimg, score 1.00 times EDM's, between 0.88 and 1.13 with 95 % confidence; "
                           "by the paper's FIDs it is 0.94 at BNR 0.5.")
    assert 'it takes 8 to find' in text
    assert 'it takes 2 to find' in sentence([(False, 0, 80, 2.0), (False, 1, 40, 2.0)])[0]  # equal to the bit


def test_followed_further(tmp_path):
    """A run named in `longer` is scored at all of `main`, and has rows beside EDM and Warm of the same seeds."""
    scale = dataclasses.replace(SCALES['digits'], longer=('warm-bnr0.1',))
    kimgs = {run.name: [score.kimg for score in run.scores] for run in plan(scale)}
    assert kimgs['warm-bnr0.1-uncond-s2'] == list(scale.main) and kimgs['warm-bnr1-uncond-s2'] == [scale.side]
    lines = [line(run_name(name, seed=s), k, v, s) for s in (0, 1) for name, k, v in (
        ('edm', 40, 4.0), ('edm', 80, 2.0), ('warm', 40, 5.0), ('warm', 80, 1.0), ('warm-bnr0.1', 40, 3.0))]
    lines.append(line('warm-bnr0.1-uncond-s0', 80, 1.5))
    (tmp_path / 'digits.jsonl').write_text(''.join(json.dumps(x) + '\n' for x in lines))
    read = functools.partial(Scores.read, path=tmp_path / 'digits.jsonl')
    text = study_answers.followed(read(scale), None)
    assert '| BNR 0.1, 40 kimg | 3 ± 0 (2) | -1 ± 0 (-25%) | better | -2 ± 0 (-40%) | better |' in text
    assert ('| BNR 0.1, 80 kimg | 1.5 | -0.5 (-25%) | undecided (one seed) | +0.5 (+50%) | undecided (one seed) |'
            in text)
    assert 'BNR 0.1: all 2 pairs of runs together' in text and 'score 0.75 times' in text
    assert study_answers.followed(read(SCALES['digits']), None) == study_answers.NOTHING


def test_page_with_inception_scores_and_times(tmp_path):
    """Where they were measured, and the machine was quiet, they have columns, and there is a figure against time."""
    scale = SCALES['cifar10-16']
    found = {('edm', 'FD-cifar16'): 3, ('warm', 'FD-cifar16'): 2, ('edm', 'IS-cifar16'): 5, ('warm', 'IS-cifar16'): 6}
    rows = [dict(line(run_name(name), kimg, value + k), metric=metric, num_images=scale.num, train_seconds=float(kimg))
            for k, kimg in enumerate(scale.main) for (name, metric), value in found.items()]
    rows += [dict(row, metric='IS-cifar16_std', value=0.1) for row in rows if row['metric'] == 'IS-cifar16']
    (tmp_path / 'cifar10-16.jsonl').write_text(''.join(json.dumps(x) + '\n' for x in rows))
    text = study_page.page(tmp_path, study_page.Figures(tmp_path))
    assert '|  | EDM | Warm, BNR 0.5 | minus EDM | verdict | Warm, rest-loss=unit | minus EDM | verdict |' in text
    assert f'| unconditional, {scale.main[0]:g} kimg | 3 | 2 | -1 (-33%) | undecided (one seed) | – | – | – |' in text
    assert ('|  | EDM: IS-cifar16 | Warm, BNR 0.5: IS-cifar16 | Warm, rest-loss=unit: IS-cifar16 '
            '| EDM: training |') in text
    assert (f'| unconditional, {scale.main[0]:g} kimg | 5 | 6 | – '
            f'| {scale.main[0]:g} s | {scale.main[0]:g} s | – |') in text
    assert (tmp_path / 'results-cifar10-16-time.png').exists()


@pytest.mark.parametrize('measured', [False, True])
def test_hours_at_full_size(tmp_path, measured):
    """The hours follow from measured images/s; without those, the page says that they were not measured."""
    row = dict(preset='ffhq', system='edm', parameters=60e6, gflop_an_image=250.0,
               images_per_second=1000.0 if measured else None, hours=200e6 / 8000 / 3600 if measured else None)
    cost = dict(rows=[row], environment=dict(gpu='a GPU' if measured else None))
    (tmp_path / 'cost.json').write_text(json.dumps(cost))
    text = study_page.page(tmp_path, study_page.Figures(tmp_path))
    cells = '1000 | 6.9 | 4.9' if measured else '– | – | 4.9'
    assert f'| `train.py --preset=ffhq --precond=edm` | 60.0 M | 250 | {cells} |' in text
    assert '| `train.py --preset=ffhq` | – | – | – | – | – |' in text
    assert ('the images/s, on one a GPU' in text) == measured == ('have not been measured' not in text)


def test_the_committed_page_is_made_of_the_committed_numbers(tmp_path):
    """docs/results.md is what `python -m warm.study.page` writes; the README and the notes have its intervals."""
    text = study_page.page(ROOT / 'results', study_page.Figures(tmp_path))
    assert (ROOT / 'docs' / 'results.md').read_text(encoding='utf-8') == text
    for name in pathlib.Path(tmp_path).glob('*.png'):
        assert (ROOT / 'docs' / name.name).exists()
    titles = '|'.join(re.escape(title) for title in study_answers.TITLES.values())
    intervals = re.findall(rf'\n(?:{titles}): all .* between (\S+) and (\S+) with 95 % confidence', text)
    readme = (ROOT / 'README.md').read_text(encoding='utf-8')
    assert len(intervals) == 4 and all(f'| {low}–{high} |' in readme for low, high in intervals)
    said = written_notes()
    for low, high in intervals:
        ahead, behind = round(100 - 100 * float(low)), round(100 * float(high) - 100)
        assert re.search(f'{ahead} % ahead (of EDM )?and {behind} % behind', said)
    verdicts = re.findall(r'\| (better|worse|undecided) (?=\|)', text)
    assert f'Of {len(verdicts)} verdicts below, ten decide' in said
    assert len(verdicts) - verdicts.count('undecided') == 10


def written_notes():
    """All that is written by hand for the page, on one line."""
    return ' '.join(' '.join(path.read_text(encoding='utf-8') for path in (ROOT / 'results').glob('notes*.md')).split())


def test_the_notes_say_what_the_numbers_say():
    """Of the weight of R and of crossed networks, on which the notes draw conclusions."""
    notes = written_notes()
    photos, digits = (Scores.read(SCALES[name], ROOT / 'results' / f'{name}.jsonl')
                      for name in ('cifar10-16', 'digits'))

    def percent(scores, kimg, reference, what='warm-rest-loss-unit', **options):
        ours, theirs = (scores.values(name, kimg, **options) for name in (what, reference))
        return [round(100 * (ours[seed] / theirs[seed] - 1)) for seed in ours]

    def signed(*args, **options):
        *seeds, last = [f'{p:+}'.replace('-', '−') if p else '0' for p in percent(photos, *args, 'edm', **options)]
        return ' and '.join([', '.join(seeds), last] if seeds else [last]) + ' %'
    assert 'score {}, {} and {} % better than EDM after 32 kimg (decided), with labels {}, {} and {} % (und'.format(
        *(-p for cond in (False, True) for p in percent(photos, 32, 'edm', cond=cond))) in notes
    assert (f'say {signed(64)} after 64 kimg (with labels {signed(64, cond=True)}), {signed(128)} after 128, '
            f'{signed(256)} after 256, all undecided') in notes
    others = [[signed(kimg, what=name) for kimg in SCALES['cifar10-16'].main] for name in SCALES['cifar10-16'].longer]
    assert 'BNR 0.1 stands at {} after 32 kimg, {} after 64, {} after 128 and {} after 256;'.format(*others[0]) in notes
    assert '(c) at {}, {}, {} and {} (seeds 0, 1, 2'.format(*others[1]) in notes
    assert f"Warm by default is {percent(photos, 256, 'edm', 'warm')[0]} % behind at the end" in notes
    errors = photos.errors_of('warm-clean-blurred', 64, 'R', 0.1).values()
    assert f"({sum(errors) / len(errors):.2f} of the filter's error at β = 0.1)" in notes
    digits_say = percent(digits, 40, 'warm')
    assert 'worse than the default after 40 kimg, by {}, {} and {} % (decided)'.format(*digits_say) in notes
    d = compare(photos.values('warm-rest-loss-unit', 32), photos.values('edm', 32))
    p = 2 * scipy.special.stdtr(len(d.pairs) - 1, d.mean / d.spread * len(d.pairs) ** 0.5)
    assert f'(p = {p:.3f})' in notes and d.verdict == 'better'
    parts = []
    for number, network in enumerate(dict.fromkeys(line['network_sha256'] for line in photos.crossed)):
        crossed = {(line['take'], line['low'], line['high']): line['value'] for line in photos.crossed
                   if line['network_sha256'] == network}
        own, R, D = (crossed[take, 0, None] for take in ('none', 'R', 'D'))
        other = photos.values('warm-rest-loss-unit', 32)[number]
        assert own - R + own - D == pytest.approx(own - other, rel=0.05)  # the gains add up
        parts.append(round(100 * (own - R) / (own - other)))
        if number == 0:
            assert max(crossed['R', 0.3, None], crossed['R', 0, 0.3]) < 0.97 * own  # "above β = 0.3 and below"
    assert '(R {} and {} %)'.format(*parts) in notes


def test_every_question_has_a_section():
    assert {title[0] for title in study_answers.QUESTIONS if title[0].isdigit()} == {*QUESTIONS, '3'}


def test_tidying_keeps_the_unscored_networks_of_a_parent_too(tiny, tmp_path):
    """Not only the last one, from which others start."""
    run = next(run for run in plan(tiny) if run.name == 'edm-uncond-s0')
    here = study.Study(tiny, tmp_path, tmp_path / 'digits.jsonl', study_pieces.Clock())
    kept = here.folder(run.name) / study.KEPT
    kept.mkdir(parents=True)
    for kimg in (1, 2, 4):
        (kept / f'network-snapshot-{kimg:06d}.safetensors').touch()
    study.tidy_run(here, run, starts_others=True)
    assert {p.stem[-1] for p in kept.iterdir()} == {'2', '4'}


def test_a_network_may_be_a_little_late(tmp_path):
    """Ticks need not end at the planned number of images: 3 % later, or 1 kimg, is near enough."""
    for kimg in (3, 103, 208):
        (tmp_path / f'network-snapshot-{kimg:06d}.safetensors').touch()
    found = [study.first_after(tmp_path, kimg) for kimg in (2, 100, 200, 4)]
    assert [path and path.stem[-3:] for path in found] == ['003', '103', None, None]


def test_the_first_tick_says_nothing_of_the_speed(tmp_path):
    """It is a single step, with all that starting takes."""
    for rates, seconds in (([100.0], None), ([100.0, 2.0], 8.0)):
        lines = [{'Progress/tick': {'mean': i}, 'Timing/sec_per_kimg': {'mean': rate}} for i, rate in enumerate(rates)]
        (tmp_path / 'stats.jsonl').write_text(''.join(json.dumps(x) + '\n' for x in lines))
        assert study.training_seconds(tmp_path, 4) == seconds


def test_the_test_is_two_sided():
    """t = 3.5 of three seeds lies between the 5 % points of the one-sided test, 2.9, and of the two-sided, 4.3."""
    assert compare({0: 1.0, 1: 0.505, 2: 1.495}, dict.fromkeys(range(3), 2.0)).verdict == 'undecided'


def test_a_piece_lasts_minutes():
    assert 59 < study_pieces.Clock(1).left() <= 60
