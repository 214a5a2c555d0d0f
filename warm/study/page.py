"""Builds docs/results.md from the numbers in results/: each question, the paper's answer, and ours.

    python -m warm.study.page

The interpretation is written by hand: results/notes.md for the top of the page, results/notes-NAME.md for the scores in
results/NAME.jsonl.
"""

import functools
import json
import os
import pathlib

import click

from dnnlib.files import atomic_write
from dnnlib.flags import Tool
from warm.figures import draw
from warm.presets import PRESETS
from warm.report.data import PAPER_GPUS, PAPER_KIMG
from warm.report.plots import draw_curves
from warm.study.answers import NONE, QUESTIONS, table
from warm.study.data import LEVEL, Scores, mean_and_spread
from warm.study.plan import SCALES, plan

EXPECTED_TFLOPS = 355  # our target per GPU, for the table's last column


def setup(scores):
    """What was trained and scored, on which hardware, and how to read the tables, as Markdown."""
    scale, lines = scores.scale, scores.lines
    facts = {name: ', '.join(dict.fromkeys(str(line.get(name)) for line in lines))
             for name in ('hardware', 'torch', 'commit')}
    counts = sorted(line['parameters'] / 1e6 for line in lines if line.get('parameters'))
    parameters = dict.fromkeys(f'{count:.2f}' for count in (counts[0], counts[-1]))
    seconds = {}
    for line in sorted(lines, key=lambda line: line['point']):  # a run's last line is its full length
        seconds[line['run']] = line.get('train_seconds')
    timed = scale.timed and all(seconds.values())
    hours = f', {sum(seconds.values()) / 3600:.1f} hours of training in all' if timed else ''
    commands = (*scale.prepare, f'python -m warm.study --scale={scale.name}', 'python -m warm.study.page')
    no_fid = '' if scores.label() == 'FID' else ', which is no FID and compares with nothing outside its table'
    return '\n'.join([
        f'**{scale.note}**', '',
        f'- Scores: {scores.label()} of {scale.num:,} images against all training images{no_fid}; NFE 35 with Heun’s '
        'solver unless stated otherwise, from the same latents for all. a ± s (n): mean and standard deviation over n '
        'seeds of training; without them, one seed. Differences are taken seed by seed and decided by Student’s paired '
        f't-test at {100 * LEVEL:g} %: where there is no difference, one test in {1 / LEVEL:.0f} decides by chance.',
        *([f'- {scale.num:,} images drawn from the training set itself score {mean_and_spread(scores.real)} '
           f'({len(scores.real)} draws): a network can hardly do better, and this spread is what chance in drawing the '
           'images alone amounts to.'] if scores.real else []),
        f"- Trained with `train.py {' '.join(scale.train)}`: {' to '.join(parameters)} M parameters, "
        f'{len(seconds)} runs{hours}.',
        f"- {facts['hardware']}; PyTorch {facts['torch']}; commit {facts['commit']}.",
        '- To repeat it: ' + '; '.join(f'`{command}`' for command in commands) + '.',
    ])


def notes(results, name=''):
    """[Markdown] written by hand: for the whole page, or for the file of scores of this name; [] if there is none."""
    path = pathlib.Path(results) / f'notes{name and "-" + name}.md'
    return [path.read_text(encoding='utf-8').strip()] if path.is_file() else []


def page(results, figures):
    """The whole of docs/results.md.

    Args:
        results: Folder of the SCALE.jsonl files and of the notes.
        figures: A `Figures`.
    """
    blocks = ['# Does it work?', *notes(results)]
    for scale in SCALES.values():
        files = [path for path in (pathlib.Path(results) / f'{scale.name}.jsonl',
                                   *sorted(pathlib.Path(results).glob(f'{scale.name}--*.jsonl'))) if path.is_file()]
        found = {path.stem: Scores.read(scale, path) for path in files}
        found = {name: scores for name, scores in found.items() if scores.lines}
        if not found:
            runs = plan(scale)
            blocks += [f'## {scale.title}', f'{scale.note} Nothing is measured yet: '
                       f'`python -m warm.study --scale={scale.name}` makes {len(runs)} training runs of '
                       f'{sum(run.kimg for run in runs) / 1000:.0f} Mimg in total.']
        for name, scores in found.items():
            blocks += section(scores, name, notes(results, name), figures)
    cost = pathlib.Path(results) / 'cost.json'
    return '\n\n'.join([*blocks, recipe(json.loads(cost.read_text()) if cost.is_file() else None)]) + '\n'


def section(scores, name, comments, figures):
    """Markdown blocks for one file of scores; `name` is its name without ending, `comments` are blocks about it."""
    blocks = [f'## {scores.scale.title}, {scores.label()}', setup(scores), *comments]
    for title, question in QUESTIONS.items():
        before = len(figures.drawn)
        blocks += [f'### {title}', question(scores, functools.partial(figures, name))]
        blocks += [f'![{title}]({drawn}.png)' for drawn in figures.drawn[before:]]
    return blocks


def recipe(cost):
    """How anyone with 8 GPUs repeats the paper's own experiments, and how long it takes, as Markdown.

    Args:
        cost: The report written by tests/benchmarks/bench_presets.py, or None.
    """
    rows = []
    for name in PRESETS:
        if name == 'digits':
            continue
        for precond, twin in (('warm', ''), ('edm', ' --precond=edm')):
            costs = [row for row in (cost or {}).get('rows', ()) if (row['preset'], row['system']) == (name, precond)]
            rows.append([f'`train.py --preset={name}{twin}`', *(cost_cells(costs[0]) if costs else [NONE] * 5)])
    machine = (cost or {}).get('environment', {}).get('gpu')
    speed = (f'It also measured the images/s, on one {machine}; the hours leave out multi-GPU scaling losses.'
             if machine else '**Images/s have not been measured, as no GPU was available.**')
    return '\n\n'.join([
        '## At full size',
        f'The paper trains on {PAPER_KIMG / 1000:g} Mimg with {PAPER_GPUS} GPUs: '
        f'`torchrun --standalone --nproc_per_node={PAPER_GPUS} train.py …`, with the '
        'options of the table and `--precision=bf16 --compile --channels-last=1 --auto-resume`. '
        'GFLOP are those of a training step, per image, as counted by '
        f'`python tests/benchmarks/bench_presets.py --out=results/cost.json`. {speed} The last column assumes our '
        f'target: {EXPECTED_TFLOPS:g} TFLOP/s per GPU, 45 % of what an H200 reaches in bf16 matrix products.',
        table(['', 'parameters', 'GFLOP an image', 'images/s of one GPU', f'hours on {PAPER_GPUS}', 'hours, target'],
              rows)])


def cost_cells(row):
    """Table cells of one row of the cost: parameters, GFLOP per image, images/s, hours, and hours at the target.

    A rate without hours is of a small network (bench_presets.py --tiny) and is left out.
    """
    measured = row['hours'] is not None
    expected = 1000 * PAPER_KIMG * row['gflop_an_image'] / (1000 * EXPECTED_TFLOPS * PAPER_GPUS) / 3600
    return [f"{row['parameters'] / 1e6:.1f} M", f"{row['gflop_an_image']:.0f}",
            f"{row['images_per_second']:.0f}" if measured else NONE, f"{row['hours']:.1f}" if measured else NONE,
            f'{expected:.1f}']


class Figures:
    """Draws the page's figures into a folder and keeps their names in `drawn`."""

    def __init__(self, folder):
        self.folder, self.drawn = folder, []

    def __call__(self, file, name, curves, xlabel, ylabel, ticks=None, log=False):
        """Draw the curves with at least two points, if any, to results-FILE-NAME; `file` is the scores' file name."""
        curves = [curve for curve in curves if len(curve['x']) > 1]
        if curves:
            content = dict(curves=curves, xlabel=xlabel, ylabel=ylabel, log=log, **({'ticks': ticks} if ticks else {}))
            path = f'results-{file}-{name}'
            draw(os.path.join(self.folder, path), (5.6, 3.6), lambda f: draw_curves(f, content, ''))
            self.drawn.append(path)


@click.command(cls=Tool)
@click.option('--results', metavar='DIR', default='results', help='Where the numbers are')
@click.option('--docs', metavar='DIR', default='docs', help='Where to write results.md and its figures')
def main(results, docs):
    """Write the results page from the numbers."""
    with atomic_write(os.path.join(docs, 'results.md'), 'w') as f:
        f.write(page(results, Figures(docs)))
    print(f"Wrote {os.path.join(docs, 'results.md')}.")


if __name__ == '__main__':
    main()
