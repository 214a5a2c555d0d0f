"""Figures for the pages and commands: one style, and files that depend only on what they show."""

import os

from dnnlib.files import atomic_write, make_dirs

FORMATS = ('png', 'svg')
# A fixed salt instead of random element names; the sizes are for a page about 10 inches wide.
STYLE = {'svg.hashsalt': 'warm-diffusion', 'axes.grid': True, 'grid.alpha': 0.25, 'axes.spines.top': False,
         'axes.spines.right': False, 'font.size': 9, 'axes.titlesize': 10, 'legend.frameon': False,
         'legend.handlelength': 4,  # a marker hides the gap of a shorter dashed line
         'lines.linewidth': 1.6}


def draw(path, size, make):
    """Draw a figure with `make` and write it to `path`.png and `path`.svg; the folder is created if missing.

    Args:
        path: Path without extension.
        size: Width and height in inches.
        make: Called with an empty `matplotlib.figure.Figure` to draw on.

    Returns:
        Paths of the two files.
    """
    import matplotlib  # slow to load, and most commands draw nothing
    import matplotlib.figure

    make_dirs(os.path.dirname(os.path.abspath(path)))
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE}):
        figure = matplotlib.figure.Figure(figsize=size, layout='constrained')
        make(figure)
        paths = [f'{path}.{kind}' for kind in FORMATS]
        for kind, file in zip(FORMATS, paths):
            with atomic_write(file) as f:
                # Without these, the file would hold the date or matplotlib's version.
                metadata = {'Date': None, 'Creator': None} if kind == 'svg' else {'Software': None}
                figure.savefig(f, format=kind, dpi=120, metadata=metadata)
    return paths
