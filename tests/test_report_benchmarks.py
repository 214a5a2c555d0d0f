"""What the benchmarks share (tests/benchmarks/report.py): selection, and ratios against the right reference."""

import json
import time

import click
import pytest
import torch
from click.testing import CliRunner

from tests.benchmarks import bench_data, bench_presets, bench_sample, bench_train
from tests.benchmarks.report import GPU_IN_A_ROW, GPU_WARM_UP, Table, alternate, alternate_steps, report, select

NAMES = ['fp32', 'bf16', 'bf16, compiled', 'bf16, Warm']


def test_select():
    """Names that hold any of the words are selected, in their own order; commas in names do no harm. '=' picks one."""
    assert select(NAMES, None) == select(NAMES, '') == NAMES
    assert select(NAMES, 'Warm,compiled') == NAMES[2:] and select(NAMES, ' fp32 ') == NAMES[:1]
    assert select(NAMES, '=bf16, compiled') == NAMES[2:3] and select(NAMES, '=bf16') == NAMES[1:2]
    assert select(NAMES, '-Warm, -fp32') == NAMES[1:3] and select(NAMES, 'bf16,-compiled') == ['bf16', 'bf16, Warm']
    for wrong in ('bf16,typo', '=bf16,typo', '=typo'):
        with pytest.raises(click.BadParameter, match='typo.*fp32; bf16; bf16, compiled'):
            select(NAMES, wrong)


@pytest.mark.parametrize('benchmark, choice', [
    (bench_presets, 'lsun-church'), (bench_train, 'bf16, channels-last'), (bench_sample, 'bf16, written behind it')])
def test_an_empty_selection_is_refused_before_anything_is_measured(benchmark, choice):
    result = CliRunner().invoke(benchmark.main, ['--only=typo'])
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit)
    assert "'typo'" in result.output and choice in result.output


def test_report(tmp_path, capsys):
    seconds = alternate({'a': lambda: None, 'b': lambda: sum(range(10 ** 5))}, repeats=1)
    path = tmp_path / 'out.json'
    report('Title', [dict(way=name, seconds=s) for name, s in seconds.items()], dict(repeats=1), path)
    title, heads, *_ = capsys.readouterr().out.splitlines()
    assert title == 'Title' and heads.split() == ['way', 'seconds'] and '"commit"' in path.read_text()


def test_rows_are_written_as_they_come(tmp_path, capsys):
    """Each is printed, and in the file, before the next is measured; only the end completes the file."""
    path = tmp_path / 'out.json'
    table = Table('Title', dict(repeats=1), path, arrange=lambda rows: [*rows, 'former'])
    for i in range(3):
        table.add(dict(way=i))
        assert json.loads(capsys.readouterr().out) == dict(way=i)
        content = json.loads(path.read_text())
        assert content['rows'] == [*({'way': j} for j in range(i + 1)), 'former'] and content['complete'] is False
    table.arrange = list
    table.finish()
    assert json.loads(path.read_text())['complete'] is True


def test_a_row_that_fails_does_not_end_the_others(tmp_path, capsys):
    """Measured together or alone, it gets an error in place of numbers, and the end says that there is one."""
    asked = []

    def measure(labels):
        asked.append([label['way'] for label in labels])
        if any(label['way'] == 'b' for label in labels):
            raise torch.OutOfMemoryError('no memory\nand more')
        return [dict(seconds=1.0) for _ in labels]
    table = Table('Title', {}, tmp_path / 'out.json')
    table.attempt([dict(way='a'), dict(way='b')], measure)
    table.attempt([dict(way='c')], measure)
    with pytest.raises(click.ClickException, match='1 of 3 rows failed'):
        table.finish()
    assert asked == [['a', 'b'], ['a'], ['b'], ['c']]
    content = json.loads((tmp_path / 'out.json').read_text())
    assert content['complete'] and content['rows'] == [
        dict(way='a', seconds=1.0), dict(way='b', error='OutOfMemoryError: no memory\nand more'),
        dict(way='c', seconds=1.0)]
    cells = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ['way', 'seconds', 'error'] in cells and ['b', 'OutOfMemoryError:', 'no', 'memory'] in cells


SMALL = ['--cbase=8', '--cres=1', '--blocks=1', '--size=8', '--batch=2', '--repeats=1', '--only==bf16']


@pytest.mark.parametrize('options, rows, exit_code', [
    ([], ['reference', 'bf16'], 1), (['--no-reference'], ['bf16'], 0)])
@pytest.mark.parametrize('benchmark, broken', [(bench_train, 'Trainer.step'), (bench_sample, 'Drawer.draw')])
def test_without_a_reference_there_are_no_ratios(benchmark, broken, options, rows, exit_code, tmp_path, monkeypatch):
    """Whether it fails or is not wanted, the other rows are measured."""
    owner, name = getattr(benchmark, broken.split('.')[0]), broken.split('.')[1]
    working = getattr(owner, name)

    def fails(self, *args, **kwargs):
        if getattr(self, 'reference', False) or args and getattr(args[0], 'options', 0) is None:
            raise RuntimeError('the reference fails')
        return working(self, *args, **kwargs)
    monkeypatch.setattr(owner, name, fails)
    monkeypatch.setattr(benchmark, 'matrix_peak', lambda *_: 1e12)
    extra = ['--images=8'] if benchmark is bench_train else ['--steps=1', '--total=0']
    result = CliRunner().invoke(benchmark.main, [*SMALL, *extra, *options, f'--out={tmp_path}/out.json'])
    assert result.exit_code == exit_code, result.output
    found = {row['way']: row for row in json.loads((tmp_path / 'out.json').read_text())['rows']}
    assert list(found) == rows and found['bf16']['ratio'] is None and found['bf16']['images_per_second'] > 0
    assert 'the reference fails' in found.get('reference', dict(error='the reference fails'))['error']


@pytest.mark.parametrize('device, warm_up, in_a_row', [('cpu', 1, 1), ('cuda', GPU_WARM_UP, GPU_IN_A_ROW)])
def test_steps_in_a_row(device, warm_up, in_a_row, monkeypatch):
    """On a GPU, first steps are not timed, and it is waited for after several; the seconds are those of one step."""
    events, now = [], [0.0]
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda device: events.append('wait'))
    for clock in ('perf_counter', 'process_time'):
        monkeypatch.setattr(time, clock, lambda: now[0])

    def step():
        events.append('step')
        now[0] += 3.0
    assert alternate_steps({'a': step}, 2, device) == {'a': 3.0}
    waits = ['wait'] if device == 'cuda' else []
    assert events == ['step'] * warm_up + waits + 2 * (['step'] * in_a_row + waits)


def test_each_way_of_loading_has_its_reference(cache, tmp_path, monkeypatch):
    """Images are compared with images, batches with batches: only zip and PNG, the reference, has the ratio 1."""
    seconds = {('images', 'zip and PNG'): 4.0, ('images', 'decoded map'): 2.0,
               ('batches', 'zip and PNG'): 9.0, ('batches', 'decoded map'): 3.0}
    monkeypatch.setattr(bench_data, 'alternate', lambda tasks, repeats: {name: seconds[name] for name in tasks})
    bench_train.write_zip(f'{tmp_path}/data.zip', 8, 8)
    rows = bench_data.loading(f'{tmp_path}/data.zip', 4, 1)
    assert [row['ratio'] for row in rows] == [1.0, 2.0, 1.0, 3.0]
    assert [row['work'].split(', ')[1:] for row in rows][::2] == [
        ['zip and PNG'], ['zip and PNG', 'with the order and conversion to float']]
