"""What the benchmarks share (tests/benchmarks/report.py): selection, and ratios against the right reference."""

import time

import click
import pytest
import torch
from click.testing import CliRunner

from tests.benchmarks import bench_data, bench_presets, bench_sample, bench_train
from tests.benchmarks.report import GPU_IN_A_ROW, GPU_WARM_UP, alternate, alternate_steps, report, select

NAMES = ['fp32', 'bf16', 'bf16, compiled', 'bf16, Warm']


def test_select():
    """Names that hold any of the words are selected, in their own order; commas in names do no harm. '=' picks one."""
    assert select(NAMES, None) == select(NAMES, '') == NAMES
    assert select(NAMES, 'Warm,compiled') == NAMES[2:] and select(NAMES, ' fp32 ') == NAMES[:1]
    assert select(NAMES, '=bf16, compiled') == NAMES[2:3] and select(NAMES, '=bf16') == NAMES[1:2]
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
