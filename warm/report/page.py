"""A report of runs: reads metrics.jsonl and stats.jsonl, writes tables in the paper's layout, and plots, as Markdown.

    python -m warm.report training-runs --outdir=report     # all runs there, or name some: training-runs/00000-…

The scores come from `fid.py calc --network=…` and `train.py --eval=…`, which append them to the run's metrics.jsonl.
"""

import os

import click

from dnnlib.files import atomic_write, make_dirs
from dnnlib.flags import Tool
from warm.report.data import measurements_of, read_run, run_paths
from warm.report.plots import draw_all
from warm.report.tables import all_scores, tables


@click.command(cls=Tool)
@click.argument('runs', metavar='RUN…', nargs=-1, required=True)
@click.option('--outdir', metavar='DIR', default='report', help='Where to save report.md and the plots')
def main(runs, outdir):
    """Write a report of run folders (or metrics.jsonl files): the paper's Tables 1 to 5, and plots.

    A folder of runs, such as training-runs, stands for all runs in it.
    """
    paths = [path for run in runs for path in run_paths(os.path.normpath(run))]
    runs = [read_run(path) for path in dict.fromkeys(paths)]
    measurements = measurements_of(runs)
    make_dirs(outdir)
    plots = draw_all(outdir, runs, measurements)
    path = os.path.join(outdir, 'report.md')
    with atomic_write(path, 'w') as f:
        f.write(report_page(runs, measurements, plots))
    click.echo(f'Wrote {path} with {len(measurements)} measurement(s) of {len(runs)} run(s) and {len(plots)} plot(s).')


def report_page(runs, measurements, plots):
    """The whole report as Markdown.

    Args:
        runs: `warm.report.data.Run`s.
        measurements: Their `Measurement`s.
        plots: [(caption, path without ending)] of figures in the report's folder.
    """
    blocks = [
        '# Report',
        'The paper’s numbers are those of Warm Diffusion (ICLR 2025), of 50,000 images (in a part of Table 2: 10,000), '
        'the best of three rounds; of ours, the best round counts too. "–": the paper gives none, or there is no score '
        'of ours.',
        'Runs: ' + ', '.join(f'`{run.name}` ({len(run.scores)} score(s))' for run in runs),
        tables(measurements),
        '## Plots',
        *(f'![{caption}]({os.path.basename(path)}.png)\n\n{caption}. [SVG]({os.path.basename(path)}.svg)'
          for caption, path in plots),
        *([] if plots else ['None: too few scores, and no stats.jsonl.']),
        '## All scores',
        all_scores(measurements) if measurements else
        'None. `fid.py calc --network=SNAPSHOT` and `train.py --eval=TICKS` make some.',
    ]
    return '\n\n'.join(blocks) + '\n'
