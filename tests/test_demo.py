"""warm.demo: the picture of its outcome, from made-up images; its runs are those of the commands, tested elsewhere."""

import matplotlib.figure
import numpy as np
import torch

from training.pictures import tile
from warm.demo import RUNS, draw_outcome, draw_panels, reals_by_class
from warm.systems import SYSTEMS
from warm.trajectory import ROWS, Frame

NETWORK = dict(img_resolution=8, img_channels=1, label_dim=10, model_type='SongUNet', model_channels=8,
               channel_mult=[1], num_blocks=1)


def frames(count):
    """`count` random frames of one image."""
    generator = torch.Generator().manual_seed(0)
    return [Frame(80.0 / 2 ** i, 40.0 / 2 ** i, *torch.randn([3, 1, 1, 8, 8], generator=generator))
            for i in range(count)]


def test_panels():
    """Three panels of digits with a class per column, and the reverse process with its noise levels and rows."""
    figure, digits = matplotlib.figure.Figure(), reals_by_class(2)
    draw_panels(figure, {'Real digits': digits, 'EDM': digits, 'Warm': 255 - digits}, frames(5))
    *panels, process = figure.axes
    assert [axis.get_title() for axis in panels] == ['Real digits', 'EDM', 'Warm']
    assert np.array_equal(panels[0].images[0].get_array(), tile(digits, columns=10)[0])
    assert [label.get_text() for label in process.get_xticklabels()][::4] == ['β=80\nα=40', 'β=5\nα=2.5']
    assert [label.get_text() for label in process.get_yticklabels()] == list(ROWS)
    assert process.images[0].get_array().shape == tile(np.tile(digits, [2, 1, 1, 1])[:20], columns=5)[0].shape


def test_picture_of_the_runs(tmp_path, monkeypatch):
    """Drawn as by the command, but without sampling ten classes of two networks, which is slow: PNG and SVG."""
    nets = {name: SYSTEMS[name].network_class(**NETWORK).eval() for name in RUNS}
    monkeypatch.setattr('warm.demo.read_snapshot', lambda path: path)
    monkeypatch.setattr('warm.demo.last_snapshot', lambda outdir, name: name)
    monkeypatch.setattr('warm.demo.build_network', lambda name, systems: nets[name])
    monkeypatch.setattr('warm.demo.samples_by_class', lambda net, name, rows: reals_by_class(rows))
    files = draw_outcome(tmp_path / 'demo', tmp_path)
    assert files == [str(tmp_path / 'demo.png'), str(tmp_path / 'demo.svg')]
    assert (tmp_path / 'demo.svg').read_text().count('<image') == 4
