"""What the benchmarks share (tests/benchmarks/report.py): selection, and ratios against the right reference."""

import click
import pytest
from click.testing import CliRunner

from tests.benchmarks import bench_data, bench_presets, bench_train
from tests.benchmarks.report import alternate, report, select

NAMES = ['fp32', 'bf16', 'bf16, compiled', 'bf16, Warm']


def test_select():
    """Any of the words, in the order of the names; commas in names do no harm."""
    assert select(NAMES, None) == select(NAMES, '') == NAMES
    assert select(NAMES, 'Warm,compiled') == NAMES[2:] and select(NAMES, ' fp32 ') == NAMES[:1]
    with pytest.raises(click.BadParameter, match='typo.*fp32; bf16; bf16, compiled'):
        select(NAMES, 'bf16,typo')


@pytest.mark.parametrize('benchmark, choice', [(bench_presets, 'lsun-church'), (bench_train, 'bf16, channels-last')])
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


def test_each_way_of_loading_has_its_reference(cache, tmp_path, monkeypatch):
    """Images against images, batches against batches: only zip and PNG have the ratio 1."""
    seconds = {('images', 'zip and PNG'): 4.0, ('images', 'decoded map'): 2.0,
               ('batches', 'zip and PNG'): 9.0, ('batches', 'decoded map'): 3.0}
    monkeypatch.setattr(bench_data, 'alternate', lambda tasks, repeats: {name: seconds[name] for name in tasks})
    bench_train.write_zip(f'{tmp_path}/data.zip', 8, 8)
    rows = bench_data.loading(f'{tmp_path}/data.zip', 4, 1)
    assert [row['ratio'] for row in rows] == [1.0, 2.0, 1.0, 3.0]
    assert [row['work'].split(', ')[1:] for row in rows][::2] == [
        ['zip and PNG'], ['zip and PNG', 'with the order and conversion to float']]
