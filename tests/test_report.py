"""warm.report: the paper's tables with our numbers beside them, and the plots, from made-up scores."""

import json

import matplotlib
import numpy as np
import pytest
from click.testing import CliRunner
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from training.provenance import training_facts
from warm.figures import STYLE
from warm.precond import WarmPrecond
from warm.report import page as report
from warm.report.data import best_match, flags_beyond_defaults, measurements_of, read_run
from warm.report.plots import draw_curves, fid_against_bnr, fid_against_nfe, training_curves
from warm.report.tables import TABLE_1, TABLE_2, TABLE_3, TABLE_4, TABLE_5, all_scores, tables
from warm.systems import SYSTEMS

PAPER = dict(metric='FID', detector='inception-2015-12-05', detector_sha256='a', ref='r.npz', ref_sha256='b',
             num_images=50_000, seeds='0-49999', nfe=35, solver='heun', bnr=0.5, path='constant BNR 0.5',
             trained_on='constant BNR 0.5', targets='residual', kimg=200_000.0, system='warm', dataset='cifar10-32x32',
             label_dim=0, sampler={}, network='network-snapshot-200000.safetensors', network_sha256='c', class_idx=None,
             seconds=100.0, commit='v1', device='cuda')
EDM = dict(system='edm', bnr=0.0, path=None, trained_on=None, targets=None, network_sha256='e')
CLI = CliRunner()


def rounds(values, **changes):
    """Lines of a metrics.jsonl: a round for each value."""
    n = changes.get('num_images', PAPER['num_images'])
    return [{**PAPER, **changes, 'value': v, 'seeds': f'{i * n}-{(i + 1) * n - 1}'} for i, v in enumerate(values)]


def make_run(folder, lines, stats=()):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    if stats:
        (folder / 'stats.jsonl').write_text(''.join(json.dumps(
            {'Progress/kimg': {'mean': kimg}, 'Loss/loss': {'mean': loss}}) + '\n' for kimg, loss in stats))
    return folder


def rows(text):
    """Cells of all table rows."""
    lines = [line for line in text.splitlines() if line.startswith('| ')]
    return [[cell.strip() for cell in line.strip('|').split('|')] for line in lines]


def found_row(text, title, ours=True):
    return next(row for row in rows(text) if row[0] == title and (row[-1] != 'not measured') == ours)


def measured(tmp_path, lines):
    return measurements_of([read_run(make_run(tmp_path / 'run', lines))])


def report_of(tmp_path, lines):
    return tables(measured(tmp_path, lines))


def test_the_paper_repeated_differs_in_nothing(tmp_path):
    """50,000 images, three rounds, the best counts: 1.84 beside 1.85, and the Inception Score's best is its largest."""
    lines = rounds([1.9, 1.84, 1.88]) + rounds([10.01, 9.9, 10.05], metric='IS') + rounds([.1, .2, .3], metric='IS_std')
    text = report_of(tmp_path, lines)
    assert found_row(text, 'Warm (BNR 0.5)')[1:] == ['35', '1.85', '10.02', '35', '1.84', '10.05', 'nothing']
    assert found_row(text, '0.5')[4:] == ['35', '1.84', '10.05', 'nothing']
    assert found_row(text, '(d) R: x_rest, D: V M Vᵀx₀')[4:6] == ['35', '1.84']
    assert sum(row[-1] == 'not measured' for row in rows(text)) == \
        sum(len(r) for _, r in (*TABLE_1.values(), *TABLE_2.values())) + len(TABLE_3) + len(TABLE_4) + len(TABLE_5) - 3


@pytest.mark.parametrize('changes, words', [
    (dict(nfe=11), 'NFE 11 instead of 35'), (dict(num_images=5000), '5,000 images'),
    (dict(kimg=2000.0), 'trained on 2 of 200 Mimg'), (dict(metric='FD-pixels', detector='pixels'),
                                                      'FD-pixels instead of FID'),
    (dict(solver='dpmpp2m'), 'solver dpmpp2m'),
    (dict(trained_on='BNRs from 0.1 to 2'), 'network for BNRs from 0.1 to 2'),
    (dict(sampler={'S_churn': 30, 'sigma_max': 50}), '`--S_churn=30`; `--sigma_max=50`'),
    (dict(precision='bf16'), 'precision bf16'),
    (dict(class_idx=3), 'class 3 alone'), (dict(dataset='digits-8x8'), 'data digits-8x8 instead of CIFAR-10')])
def test_what_differs_is_said(tmp_path, changes, words):
    text = report_of(tmp_path, rounds([2.5, 2.4, 2.6], **changes))
    assert found_row(text, '0.5')[-1] == words
    one_round = report_of(tmp_path, rounds([2.5]))
    assert found_row(one_round, '0.5')[-1] == '1 round'


def test_each_score_finds_its_row(tmp_path):
    """Systems, BNRs, schedules and targets; what the paper doesn't have gets a row without its numbers."""
    text = report_of(tmp_path, [
        *rounds([1.97], **EDM), *rounds([1.95], **{**EDM, 'sampler': {'epsilon_scale': '1.0006'}}),
        *rounds([1.79], **EDM, label_dim=10), *rounds([9.0], targets='blurred'), *rounds([2.6], bnr=2.0),
        *rounds([2.1], bnr=1.5), *rounds([3.0], bnr=None, path='blurring schedule up to 20 pixels', nfe=79),
        *rounds([3.5], bnr=None, path='blurring schedule up to 20 pixels', nfe=59),
        *rounds([2.29], dataset='ffhq-64x64', nfe=79)])
    assert found_row(text, 'EDM')[5] == '1.97' and found_row(text, 'EDM-ES')[5] == '1.95'
    assert found_row(text, '0 (EDM)')[5] == '1.97' and found_row(text, '2')[5] == '2.60'
    assert [row[5] for row in rows(text) if row[0] == 'EDM' and row[-1] != 'not measured'] == ['1.97', '1.79']
    assert found_row(text, '1.5')[1:6] == ['–', '–', '–', '35', '2.10']
    assert [row[1:6] for row in rows(text) if row[0] == 'Blurring Diffusion' and row[5] != '–'] == [
        ['79', '4.13', '9.27', '79', '3.00'], ['–', '–', '–', '59', '3.50']]
    assert found_row(text, '(b) D: V M Vᵀx₀')[5] == '9.00'
    assert found_row(text, 'Warm (BNR 0.5)')[2:6] == ['2.29', '3.41', '79', '2.29']


def test_lsun_church_is_table_2(tmp_path):
    """The paper's numbers for 10,000 and for 50,000 images stand beside measurements of as many; EDM has none there."""
    church = dict(dataset='lsun-church-128x128', resolution=128, nfe=511)
    text = report_of(tmp_path, [
        *rounds([3.5] * 3, **church, num_images=10_000), *rounds([2.6] * 3, **church),
        *rounds([46.0] * 3, **{**church, 'nfe': 400}, system='ihdm', targets=None),
        *rounds([2.9] * 3, **church, **EDM)])
    table = rows(text[text.index('## Table 2'):text.index('## Table 3')])
    assert table[2:] == [
        ['**10,000 images**', *[''] * 7],
        ['Denoising Diffusion', '1000', '4.68', '–', '–', '–', '–', 'not measured'],
        ['Blurring Diffusion', '1000', '3.88', '–', '–', '–', '–', 'not measured'],
        ['Warm (BNR 0.5)', '511', '3.47', '–', '511', '3.50', '–', 'nothing'],
        ['**50,000 images**', *[''] * 7],
        ['IHDM', '400', '45.06', '–', '400', '46.00', '–', 'nothing'],
        ['Warm (BNR 0.5)', '511', '2.56', '–', '511', '2.60', '–', 'nothing'],
        ['EDM', '–', '–', '–', '511', '2.90', '–', 'nothing']]
    assert 'not in the paper' not in text


def test_other_resolutions_are_not_the_papers_data(tmp_path):
    """Small copies of CIFAR-10 and LSUN-church stand in no row of the paper's without being named."""
    for name, resolution in (('cifar10-16x16', 16), ('lsun-church-64x64', 64)):
        text = report_of(tmp_path, rounds([1.8], dataset=name, resolution=resolution))
        assert f'**{name}, unconditional** (not in the paper)' in text
        assert found_row(text, '0.5')[-1] == f'data {name} instead of CIFAR-10; 1 round'


def test_blurring_diffusion_without_blur_is_its_baseline(tmp_path):
    """Scores of older versions don't say how much blur there was; the run's options do, where they are at hand."""
    common = dict(system='blurring', dataset='lsun-church-128x128', nfe=1000, num_images=10_000)
    for blur, title in ((0.0, 'Denoising Diffusion'), (20.0, 'Blurring Diffusion')):
        folder = make_run(tmp_path / title, rounds([5.0] * 3, **common))
        (folder / 'training_options.json').write_text(json.dumps({'network_kwargs': {'sigma_blur_max': blur}}))
        now = rounds([5.0] * 3, **common, network_options={} if blur else {'sigma_blur_max': 0.0})
        for runs in ([folder], [make_run(tmp_path / f'now {blur}', now)]):
            text = tables(measurements_of(map(read_run, runs)))
            assert [(row[0], row[-1]) for row in rows(text) if row[5] == '5.00'] == [(title, 'nothing')]


OTHER_VALUES = {'bnr': '0.3', 'targets': 'clean', 'rest_weight': 4.0, 'sigma_blur_max': 10.0, 'd_min': 0.01,
                'aug_dim': 8, 'soft_bnr': 1.0, 'f_final': 0.1, 'ihdm_levels': 20, 'ihdm_blur_max': 10.0,
                'cold_steps': 20}


@pytest.mark.parametrize('system, option', [
    (system, option) for system in SYSTEMS.values() for option in system.network_options],
    ids=lambda value: value.name)
def test_a_network_with_other_options_differs(tmp_path, system, option):
    """Options of the network that are not the defaults are recorded with its scores, and said beside the paper's.

    Warm's make another row or title.
    """
    def said(value):
        size = dict(img_resolution=8, img_channels=1, model_channels=8, channel_mult=[1], num_blocks=1)
        net = system.network_class(**size, **system.network_kwargs({option.name: value}))
        facts = {**training_facts(net, system, 'cifar10-32x32', {}), **system.describe(net, {}), 'resolution': 32}
        text = report_of(tmp_path, rounds([1.5] * 3, **{**EDM, 'solver': None, **facts}))
        return {cell for row in rows(text) if row[5] == '1.50' for cell in (row[0], *row[-1].split('; '))}

    other = OTHER_VALUES.get(option.name) or next(
        value for value in getattr(option.type, 'choices', ['blurring']) if value != option.default)
    usual, changed = said(option.default), said(other)
    assert usual and changed and (changed - usual if issubclass(system.network_class, WarmPrecond) else
                                  changed - usual == {f'`{option.flag}={other}`'})


def test_other_targets_are_not_the_method(tmp_path):
    """At BNR 0.5 they have a row of Table 5, elsewhere one of their own among the methods."""
    schedule = dict(bnr=None, path='blurring schedule up to 20 pixels')
    text = report_of(tmp_path, [*rounds([1.0], targets='clean'),
                                *rounds([1.0], targets='clean', bnr=1.5, path='constant BNR 1.5'),
                                *rounds([1.0], targets='clean', nfe=79, **schedule),
                                *rounds([1.0], targets='clean', nfe=59, **schedule)])
    assert [row[0] for row in rows(text) if row[5] == '1.00'] == [
        'Warm (constant BNR 1.5, clean)', 'Warm (blurring schedule up to 20 pixels, clean)', '(a) R: x₀']


def test_methods_of_ones_own_have_rows(tmp_path):
    """A system, a schedule and a choice that the tables do not know; options of a loss are said, and never win."""
    own = dict(path=None, trained_on=None, targets=None, bnr=None)
    for data in ({}, dict(dataset='digits-8x8')):
        text = report_of(tmp_path, [
            *rounds([2.0], system='flow', **own, **data), *rounds([3.0], targets='residual --rest-scale=edm', **data),
            *rounds([4.0], bnr=None, path='sigmoid BNR up to 1', **data), *rounds([5.0], **{**EDM, **data}),
            *rounds([4.5], **{**EDM, **data, 'network_sha256': 'f'}, loss={'p_mean': 0.5})])
        assert [(row[0], row[5]) for row in rows(text) if row[5] in ('2.00', '3.00', '4.00', '4.50')] == [
            ('flow', '2.00'), ('Warm (constant BNR 0.5, residual --rest-scale=edm)', '3.00'),
            ('Warm (sigmoid BNR up to 1)', '4.00')]
        assert found_row(text, 'EDM')[5] == '5.00'
    shown = report_of(tmp_path, rounds([4.5], **EDM, loss={'p_mean': 0.5}))
    assert '`--p-mean=0.5`' in found_row(shown, 'EDM')[-1]


def test_no_measurement_is_lost(tmp_path):
    """Tables 3 and 5 are drawn for one of the paper's data sets only; on the others, their rows join the methods'."""
    title = 'Warm (constant BNR 0.3)'
    for data in (dict(label_dim=10), dict(dataset='ffhq-64x64', resolution=64)):
        text = report_of(tmp_path, rounds([2.0], bnr=0.3, path='constant BNR 0.3', **data)
                         + rounds([3.0], targets='clean', **data))
        assert found_row(text, title)[5] == '2.00'
        assert found_row(text, 'Warm (constant BNR 0.5, clean)')[5] == '3.00'
    stf = dict(system='stf', path=None, targets=None)
    scaled = report_of(tmp_path, rounds([2.0], **stf, sampler={'epsilon_scale': '1.001'}))
    assert found_row(scaled, 'STF (epsilon scaling)')[5] == '2.00'
    assert all(row[0] != '–' for row in rows(report_of(tmp_path, rounds([2.0], system=None, dataset=None))))


def test_rounds_of_older_and_newer_versions_are_one_measurement(tmp_path):
    lines = rounds([2.0, 2.1, 2.2])
    lines[2].update(architecture='SongUNet', parameters=55_700_000, loss={})
    measurement, = measured(tmp_path, lines)
    assert measurement.rounds == 3 and measurement.facts['architecture'] == 'SongUNet'


def test_networks_are_named_where_known(tmp_path):
    lines = rounds([2.0], architecture='DhariwalUNet', parameters=295_899_558) + rounds([2.0], network_sha256='d')
    assert [row[3] for row in rows(all_scores(measured(tmp_path, lines)))[2:]] == ['DhariwalUNet, 296 M', '–']


def test_the_measurement_nearest_to_the_paper_is_shown(tmp_path):
    text = report_of(tmp_path, rounds([1.5], num_images=1000) + rounds([2.0]) + rounds([1.4], nfe=17)
                     + rounds([1.3], kimg=1000.0))
    assert found_row(text, '0.5')[4:6] == ['35', '2.00']


def test_the_best_of_a_scan_is_not_the_methods_score(tmp_path):
    """A churn, noise levels or an epsilon that suit the reference are shown only for want of others, and then named."""
    scan = [line for churn in (10, 30) for line in rounds([1.7, 1.8, 1.9], sampler={'S_churn': churn})]
    assert found_row(report_of(tmp_path, scan), '0.5')[-1] == '`--S_churn=10`'
    text = report_of(tmp_path, scan + rounds([1.97, 1.98, 1.99]))
    assert found_row(text, '0.5')[4:] == ['35', '1.97', '–', 'nothing']
    assert found_row(report_of(tmp_path, scan + rounds([2.5], nfe=17)), '0.5')[-1] == 'NFE 17 instead of 35; 1 round'
    text = report_of(tmp_path, rounds([1.95, 1.96, 1.97], **{**EDM, 'sampler': {'epsilon_scale': '1.0006'}}))
    assert found_row(text, 'EDM-ES')[-1] == '`--epsilon-scale=1.0006`'


def test_options_that_change_nothing_are_no_difference(tmp_path):
    """A scan's first point may be the default; steps, solver and path have columns of their own."""
    usual = dict(num_steps=18, solver='heun', bnr='0.5', S_churn=0, S_max=float('inf'), rho=7, sigma_max=80.0)
    assert found_row(report_of(tmp_path, rounds([1.9] * 3, sampler=usual)), '0.5')[-1] == 'nothing'
    for system in SYSTEMS.values():
        own = {option.name: option.default for option in system.own_sample_options if option.default is not None}
        assert flags_beyond_defaults(dict(system=system.name, sampler=dict(own, data='digits.zip'))) == []
    assert flags_beyond_defaults(dict(system='edm', sampler={'schedule': 'vp'})) == ['--schedule=vp']
    assert flags_beyond_defaults(dict(system='cold', sampler={'cold_start': 'colours'})) == ['--cold-start=colours']
    assert flags_beyond_defaults(dict(system='unheard of', sampler={'x': 1})) == ['--x=1']
    assert flags_beyond_defaults({}) == []


COLD = dict(system='cold', nfe=50, bnr=None, path=None, trained_on=None, targets=None, solver=None)


def test_whose_prior_a_score_measures_is_said(tmp_path):
    """Scores from another start or with another blur are never rounds of each other; older records name no start."""
    blurred = dict(COLD, prior='blurred training images', cold_blur='paper', cold_start='blurred')
    colours = dict(COLD, prior='mean colours of training images', cold_blur='strong', cold_start='colours')
    given = {'cold_start': 'colours'}
    lines = rounds([80.0] * 3, **blurred) + rounds([90.0] * 3, **colours, sampler=given)
    text = report_of(tmp_path, lines)
    assert found_row(text, 'Cold Diffusion (Blur)')[5:] == ['80.00', '–', 'starts from blurred training images']
    assert found_row(text, 'Cold Diffusion (Blur), from colours')[5:] == [
        '90.00', '–', '`--cold-start=colours`; starts from mean colours of training images; `--cold-blur=strong`']
    paths, options = zip(*[(row[4], row[7]) for row in rows(all_scores(measured(tmp_path, lines)))[2:]])
    assert paths == ('cold from blurred training images', 'cold from mean colours of training images')
    assert options == ('`--cold-blur=paper`', '`--cold-start=colours --cold-blur=strong`')
    text = report_of(tmp_path, rounds([80.0] * 3, **COLD) + rounds([90.0] * 3, **COLD, sampler=given))
    assert found_row(text, 'Cold Diffusion (Blur)')[5:] == ['80.00', '–', 'nothing']
    assert found_row(text, 'Cold Diffusion (Blur), from colours')[5:] == ['90.00', '–', '`--cold-start=colours`']
    text = report_of(tmp_path, rounds([18.0] * 3, **{**COLD, 'system': 'ihdm', 'nfe': 200}, prior=blurred['prior']))
    assert found_row(text, 'IHDM')[5:] == ['18.00', '–', 'starts from blurred training images']


def test_precisions_are_not_rounds_of_each_other(tmp_path):
    """The same seeds in two precisions are two measurements; float32 is shown although bf16 came out better."""
    lines = rounds([2.0], precision='fp32') + rounds([1.5], precision='bf16')
    measurements = measured(tmp_path, lines)
    assert [(m.rounds, m.values['FID']) for m in measurements] == [(1, 2.0), (1, 1.5)]
    assert best_match(measurements) is measurements[0]
    assert [row[7] for row in rows(all_scores(measurements))[2:]] == ['`--precision=fp32`', '`--precision=bf16`']


def curves_of(plot):
    return {curve['label']: curve['y'] for curve in plot['curves'] if 'paper' not in curve['label']}


def test_plots_show_methods_not_ablations(tmp_path):
    """Other targets, epsilons, churns and single classes all score better here, and are in no curve."""
    lines = []
    for nfe in (35, 79):
        lines += rounds([3.0], nfe=nfe) + rounds([4.0], nfe=nfe, **EDM)
        for better in (dict(targets='clean'), dict(targets='residual --rest-scale=edm'), dict(class_idx=3),
                       dict(sampler={'S_churn': 30}), {**EDM, 'sampler': {'epsilon_scale': '1.0006'}}):
            lines += rounds([1.0], nfe=nfe, **better)
    measurements = measured(tmp_path, lines)
    assert curves_of(fid_against_nfe(measurements)) == {'BNR 0.5': [3.0, 3.0], 'EDM': [4.0, 4.0]}
    assert curves_of(fid_against_bnr(measurements)) == {'NFE 35': [4.0, 3.0], 'NFE 79': [4.0, 3.0]}
    ablations = measured(tmp_path, [line for line in lines if line['value'] == 1.0])
    assert fid_against_nfe(ablations) is None and fid_against_bnr(ablations) is None


def test_precisions_have_curves_of_their_own(tmp_path):
    lines = [line for nfe in (35, 79) for line in rounds([2.0], nfe=nfe, precision='fp32')
             + rounds([1.9], nfe=nfe, precision='bf16')]
    assert curves_of(fid_against_nfe(measured(tmp_path, lines))) == {
        'BNR 0.5, fp32': [2.0, 2.0], 'BNR 0.5, bf16': [1.9, 1.9]}


def test_training_curve_is_of_one_way_of_sampling(tmp_path):
    series = [line for kimg in (1.0, 2.0) for line in rounds([2.0], kimg=kimg)]
    run = read_run(make_run(tmp_path / 'run', series + rounds([1.0], kimg=2.0, sampler={'S_churn': 30})))
    assert [curve['y'] for curve in training_curves([run])[1]['curves']] == [[2.0, 2.0]]


def test_a_line_cut_off_by_a_crash_is_left_out(tmp_path):
    folder = make_run(tmp_path / 'run', rounds([2.0]))
    with open(folder / 'metrics.jsonl', 'a') as f:
        f.write('{"metric": "FID", "val')
    assert len(read_run(folder).scores) == len(read_run(folder / 'metrics.jsonl').scores) == 1


def test_report_and_plots(tmp_path):
    """Two runs with curves: three plots as PNG and SVG, the same bytes every time."""
    series = [line for nfe in (11, 35, 79) for line in rounds([100 / nfe], nfe=nfe)]
    progress = [line for kimg in (1, 2) for line in rounds([50 / kimg], kimg=float(kimg), num_images=1000)]
    runs = [make_run(tmp_path / '00000-warm', series + progress, [(0, 1.5), (1, 1.0), (2, 0.8)]),
            make_run(tmp_path / '00001-edm', [{**line, **EDM} for line in series], [(0, 1.4), (1, 1.1)])]
    written = []
    for out in ('a', 'b'):
        result = CLI.invoke(report.main, [*map(str, runs), f'--outdir={tmp_path / out}'])
        assert result.exit_code == 0, result.output
        written.append({p.name: p.read_bytes() for p in (tmp_path / out).iterdir()})
    assert set(written[0]) == {'report.md', *(f'{name}.{kind}' for name in ('fid-bnr', 'fid-nfe', 'training')
                                              for kind in ('png', 'svg'))}
    assert written[0] == written[1]
    text = written[0]['report.md'].decode()
    assert '(fid-nfe.png)' in text and '00001-edm' in text and 'Table 5' in text


def test_report_without_scores(tmp_path):
    folder = make_run(tmp_path / 'run', [], [(0, 1.5)])
    result = CLI.invoke(report.main, [str(folder), f'--outdir={tmp_path / "out"}'])
    assert result.exit_code == 0, result.output
    assert 'fid.py calc --network' in (tmp_path / 'out' / 'report.md').read_text()


def test_bad_input(tmp_path):
    (tmp_path / 'empty').mkdir()
    for path, message in (('none', 'there is no run folder'), ('empty', 'neither a stats.jsonl nor a metrics.jsonl')):
        result = CLI.invoke(report.main, [str(tmp_path / path), f'--outdir={tmp_path / "out"}'])
        assert result.exit_code == 1 and message in result.output
    assert not (tmp_path / 'out').exists()


def test_more_rounds_than_the_papers_are_said(tmp_path):
    """The best of four is an easier number than the best of three."""
    assert found_row(report_of(tmp_path, rounds([1.9] * 4)), '0.5')[-1] == '4 rounds'


def test_scores_of_unknown_duration_are_reported(tmp_path):
    measurement, = measured(tmp_path, rounds([2.0, 2.1], seconds=None))
    assert measurement.seconds == 0


def test_a_curve_over_nfe_is_of_the_longest_training(tmp_path):
    """The earlier, worse networks of the run are in no curve."""
    lines = [line for kimg, fid in ((1000.0, 9.0), (2000.0, 3.0)) for nfe in (35, 79)
             for line in rounds([fid], kimg=kimg, network_sha256=str(kimg), nfe=nfe)]
    assert curves_of(fid_against_nfe(measured(tmp_path, lines))) == {'BNR 0.5': [3.0, 3.0]}


def test_labels_of_the_nfe_axis_do_not_overlap():
    figure = Figure()
    draw_curves(figure, dict(curves=[dict(x=[18, 19, 35], y=[3, 2, 1], label='a')], xlabel='', ylabel='', log=True), '')
    assert figure.axes[0].get_xticks().tolist() == [18, 35]


def test_line_styles_differ_in_the_legend():
    """Dashes and dots show on both sides of the marker."""
    seen = {}
    for linestyle in ('-', '--', ':'):
        with matplotlib.rc_context(STYLE):
            figure = Figure(dpi=120)
            canvas = FigureCanvasAgg(figure)
            draw_curves(figure, dict(curves=[dict(x=[0, 1], y=[0, 1], label='a', linestyle=linestyle)], xlabel='',
                                     ylabel=''), '')
            canvas.draw()
            handle = figure.axes[0].get_legend().legend_handles[0].get_window_extent()
            pixels = np.asarray(canvas.buffer_rgba())[round(figure.bbox.height - (handle.y0 + handle.y1) / 2)]
        seen[linestyle] = (pixels[round(handle.x0):round(handle.x1), 0] > 200).sum()
    assert min(seen['--'], seen[':']) >= seen['-'] + 5, seen


def test_a_run_named_twice_is_one_run(tmp_path):
    folder = make_run(tmp_path / 'run', rounds([2.0]))
    result = CLI.invoke(report.main, [str(folder), f'{folder}/', f'--outdir={tmp_path / "out"}'])
    assert '1 measurement(s) of 1 run(s)' in result.output


def test_lines_of_other_kinds_are_left_out(tmp_path):
    """Of a file that somebody else wrote: only what has a score's fields, of their types, counts."""
    good = rounds([2.0])[0]
    bad = [{name: value for name, value in good.items() if name != 'num_images'}, dict(good, nfe='35'),
           dict(good, sampler=[1]), dict(good, kimg='1'), dict(good, bnr=[0.5])]
    folder = make_run(tmp_path / 'run', [*bad, good, *bad], stats=[(1, 'x'), (2, None)])
    with open(folder / 'stats.jsonl', 'a') as f:
        f.write('{"Loss/loss": 4, "Progress/kimg": 1}\n')
    run = read_run(folder)
    assert len(measurements_of([run])) == 1 and training_curves([run]) == (None, None)


@pytest.mark.parametrize('content', ['notes', '{"levels": []}', json.dumps({**PAPER, 'value': 1.0, 'other': {}})])
def test_a_file_without_scores_of_a_network(tmp_path, content):
    """Text, errors of a network, and scores of crossed networks; a report that is there stays as it is."""
    (tmp_path / 'a.jsonl').write_text(content)
    (tmp_path / 'report.md').write_text('former')
    result = CLI.invoke(report.main, [str(tmp_path / 'a.jsonl'), f'--outdir={tmp_path}'])
    assert result.exit_code == 1 and 'a.jsonl holds no score of a network or images; give a run' in result.output
    assert (tmp_path / 'report.md').read_text() == 'former'


def test_images_in_files_have_no_seeds(tmp_path):
    run = read_run(make_run(tmp_path / 'run', [dict(line, seeds=None) for line in rounds([2.0])]))
    assert '| 1 | – | FID 2 |' in all_scores(measurements_of([run]))


def test_a_folder_of_runs_stands_for_all_of_them(tmp_path):
    """Sorted by name, without those that have nothing to report; a run that is named as well counts once."""
    for name in ('00001-b', '00000-a'):
        make_run(tmp_path / 'runs' / name, rounds([2.0]))
    make_run(tmp_path / 'runs' / '00002-no-tick-yet', [])
    (tmp_path / 'runs' / 'notes.txt').write_text('')
    named = [f'{tmp_path}/runs', f'{tmp_path}/runs/../runs/00001-b/']
    result = CLI.invoke(report.main, [*named, f'--outdir={tmp_path / "out"}'])
    assert '2 measurement(s) of 2 run(s)' in result.output
    assert 'Runs: `00000-a` (1 score(s)), `00001-b` (1 score(s))' in (tmp_path / 'out' / 'report.md').read_text()
    make_run(tmp_path / 'runs', rounds([2.0]))  # a run itself now
    assert '1 measurement(s) of 1 run(s)' in CLI.invoke(report.main, [named[0], f'--outdir={tmp_path / "out"}']).output
