"""Plots of runs: FID against BNR, FID against NFE per BNR (the paper's Fig. 5), loss and score during training."""

import re

from matplotlib.ticker import LogLocator

from training.metrics import kind_of
from training.schedules import SOLVER
from warm.figures import draw
from warm.report.data import DISTANCES, best_match, flags_beyond_defaults, is_own_score, is_plain
from warm.report.tables import BNR_SCORES, CIFAR10, TABLE_4, is_dataset, of_bnr, title_of
from warm.targets import PAPER_TARGETS

PAPER = dict(color='0.55', linestyle='--', marker='.', linewidth=1.2, label='paper')


def draw_all(folder, runs, measurements):
    """Draw every plot that there are enough scores for into `folder`; returns [(caption, path without ending)]."""
    plots = []
    groups = by_dataset(measurements)
    for dataset, group in groups.items():
        slug = '' if len(groups) == 1 else '-' + re.sub(r'[^A-Za-z0-9]+', '-', title_of(dataset))
        for name, caption, plot in (('fid-bnr', 'Distance against BNR', fid_against_bnr),
                                    ('fid-nfe', 'Distance against NFE for each BNR (Fig. 5)', fid_against_nfe)):
            curves = plot(group)
            if curves:
                path = f'{folder}/{name}{slug}'
                draw(path, (5.6, 3.6), lambda figure: draw_curves(figure, curves, title_of(dataset)))
                plots.append((f'{caption}, {title_of(dataset)}', path))
    losses, scores = training_curves(runs)
    if losses:
        draw(f'{folder}/training', (10, 3.6), lambda figure: two_panels(figure, losses, scores))
        plots.append(('Loss and score during training (losses of different systems weigh the noise levels differently)',
                      f'{folder}/training'))
    return plots


def by_dataset(measurements):
    """Group the measurements that have a distance by data set: {(name, whether conditional): measurements}."""
    groups = {}
    for m in measurements:
        if m.value('FID'):
            groups.setdefault((m.facts['dataset'], bool(m.facts['label_dim'])), []).append(m)
    return groups


def methods_alone(measurements):
    """The measurements without ablations: plain sampling and, for Warm, the paper's targets.

    A curve through the best of several targets, epsilon scales or churns would belong to no method, and a curve for
    each would hide the rest. They are in the tables.
    """
    return [m for m in measurements if is_plain(m.facts) and m.facts['targets'] in (None, PAPER_TARGETS)]


def comparable(measurements):
    """(label, measurements) of the most frequent detector and number of images; others are on another scale.

    ('', []) without measurements.
    """
    if not measurements:
        return '', []
    kinds = [(m.value('FID')[0], m.facts['num_images']) for m in measurements]
    most = max(dict.fromkeys(kinds), key=kinds.count)
    return f'{most[0]} ↓ ({most[1]:,} images)', [m for m, kind in zip(measurements, kinds) if kind == most]


def is_paper_data(label, measurements):
    """Whether the paper's CIFAR-10 numbers can be drawn in the same plot."""
    return label.startswith('FID ') and all(is_dataset(m.facts, CIFAR10) for m in measurements)


def fid_against_bnr(measurements):
    """A curve over BNR for each NFE, of `methods_alone`; BNRs evenly spaced as in Table 3. None below two BNRs."""
    label, measurements = comparable(methods_alone(measurements))
    points = {}
    for nfe in sorted({m.facts['nfe'] for m in measurements if m.facts['nfe']}):
        for bnr in sorted({m.facts['bnr'] for m in measurements if m.facts['bnr'] is not None}):
            best = best_match([m for m in measurements if of_bnr(bnr)(m.facts) and m.facts['nfe'] == nfe],
                              solver=SOLVER)
            if best:
                points.setdefault(nfe, {})[bnr] = best.value('FID')[1]
    paper = {bnr: fid for bnr, (fid, _) in BNR_SCORES.items()} if is_paper_data(label, measurements) else {}
    bnrs = sorted({bnr for curve in points.values() for bnr in curve})
    if len(bnrs) < 2:
        return None
    bnrs = sorted({*bnrs, *paper})
    curves = [dict(x=[bnrs.index(b) for b in curve], y=list(curve.values()), label=f'NFE {nfe}')
              for nfe, curve in points.items()]
    if paper:
        curves.append(dict(PAPER, x=[bnrs.index(b) for b in paper], y=list(paper.values()), label='paper, NFE 35'))
    return dict(curves=curves, xlabel='Blur-to-Noise Ratio', ylabel=label, ticks=[f'{b:g}' for b in bnrs])


def fid_against_nfe(measurements):
    """A curve over NFE for each path of `methods_alone`, and for each solver and precision if there are several.

    None if no curve has two points.
    """
    label, measurements = comparable(methods_alone(measurements))
    several = [key for key in ('solver', 'precision') if len({m.facts[key] for m in measurements}) > 1]
    points = {}
    for m in measurements:
        f = m.facts
        other_system = f['system'] not in (None, 'warm')
        if other_system:
            path = f['system'].upper()
        elif f['bnr'] is not None:
            path = f'BNR {f["bnr"]:g}'
        else:
            path = str(f['path'])
        name = ', '.join([path, *(str(f[key]) for key in several)])
        points.setdefault((other_system, f['bnr'] is None, f['bnr'] or 0, name), {}).setdefault(f['nfe'], []).append(m)
    curves = []
    for (_, _, _, name), by_nfe in sorted(points.items()):
        # A curve shows one length of training, the longest.
        longest = max(m.facts['kimg'] or 0 for ms in by_nfe.values() for m in ms)
        last = {nfe: [m for m in ms if (m.facts['kimg'] or 0) == longest] for nfe, ms in by_nfe.items()}
        best = {nfe: best_match(last[nfe]).value('FID')[1] for nfe in sorted(n for n in last if n and last[n])}
        curves.append(dict(x=list(best), y=list(best.values()), label=name))
    if not any(len(curve['x']) > 1 for curve in curves):
        return None
    if is_paper_data(label, measurements):
        rows = [row for row in TABLE_4 if row.nfe != 1000]
        curves.append(dict(PAPER, x=[r.nfe for r in rows], y=[r.fid for r in rows], label='paper, blurring schedule'))
    return dict(curves=curves, xlabel='NFE', ylabel=label, log=True)


def mean_of(line, name):
    """A statistic's mean in a line of stats.jsonl; None if there is none, or it was NaN."""
    statistic = line.get(name)
    value = statistic.get('mean') if isinstance(statistic, dict) else None
    return value if isinstance(value, (int, float)) else None


def training_curves(runs):
    """(plot of the loss, plot of the score) against kimg, a curve per run; None for a plot without curves."""
    losses, scores = [], []
    for i, run in enumerate(runs):
        colour = f'C{i % 10}'  # a run has the same colour in both panels
        points = [tuple(mean_of(line, name) for name in ('Progress/kimg', 'Loss/loss')) for line in run.stats]
        points = [point for point in points if None not in point]
        if points:
            xs, ys = map(list, zip(*sorted(points)))
            losses.append(dict(x=xs, y=ys, label=run.label, marker='', color=colour))
        curves = {}
        for line in run.scores:
            if is_own_score(line) and kind_of(line['metric']) in DISTANCES and line.get('kimg') is not None:
                key = (line['metric'], line['num_images'], line.get('nfe'), line.get('path'), line.get('solver'),
                       line.get('precision'), line.get('class_idx'), *flags_beyond_defaults(line))
                curves.setdefault(key, {})[line['kimg']] = line['value']
        # The longest series of scores that were all measured in the same way (images, NFE, …).
        (metric, num, nfe, *_), curve = max(curves.items(), key=lambda item: len(item[1]), default=((None,) * 3, {}))
        if len(curve) > 1:
            ys = [curve[k] for k in sorted(curve)]
            scores.append(dict(x=sorted(curve), y=ys, label=f'{run.label}: {metric}, {num:,} images, NFE {nfe}',
                               color=colour))
    return (dict(curves=losses, xlabel='thousands of images (kimg)', ylabel='loss') if losses else None,
            dict(curves=scores, xlabel='thousands of images (kimg)', ylabel='distance ↓') if scores else None)


def draw_curves(figure, plot, title, axis=None):
    """Draw the curves of one plot on `axis`, by default a new one."""
    axis = axis or figure.subplots()
    for curve in plot['curves']:
        style = {'marker': 'o', 'markersize': 4, **{k: v for k, v in curve.items() if k not in ('x', 'y')}}
        axis.plot(curve['x'], curve['y'], **style)
    axis.set(xlabel=plot['xlabel'], ylabel=plot['ylabel'], title=title)
    ys = [y for curve in plot['curves'] for y in curve['y']]
    if min(ys) > 0 and max(ys) > 10 * min(ys):
        axis.set_yscale('log')
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter('{x:g}')
    if plot.get('log'):
        nfes = sorted({x for curve in plot['curves'] for x in curve['x']})
        axis.set_xscale('log')
        nfes = [x for before, x in zip([0, *nfes], nfes) if x > 1.1 * before]  # 18 and 19 would overlap
        axis.set_xticks(nfes, [str(x) for x in nfes])
        axis.minorticks_off()
    if 'ticks' in plot:
        axis.set_xticks(range(len(plot['ticks'])), plot['ticks'])
    axis.legend(fontsize=7)


def two_panels(figure, losses, scores):
    """Draw the loss and, if there is one, the score side by side."""
    axes = figure.subplots(1, 2 if scores else 1, squeeze=False)[0]
    draw_curves(figure, losses, 'Loss', axes[0])
    if scores:
        draw_curves(figure, scores, 'Score', axes[1])
