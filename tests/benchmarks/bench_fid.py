"""Speed of scoring: the Fréchet distance against SciPy's sqrtm, and how much of the time is the network's.

    python tests/benchmarks/bench_fid.py [--dims 2048] [--repeats 3] [--images 256] [--out results/fid.json]

`share` of the second table is the network's own time over that of a whole pass: 1 means that decoding is hidden
behind it. Without the public weights the detector is Inception's graph with random ones, which takes as long.
"""

import pathlib
import sys
import tempfile

import click
import numpy as np
import PIL.Image
import scipy
import scipy.linalg
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from tests.benchmarks.report import alternate, report  # noqa: E402
from training.detectors import InceptionDetector  # noqa: E402
from training.inception import InceptionV3  # noqa: E402
from training.metric_fid import frechet_distance  # noqa: E402
from training.metric_images import image_batches, open_images  # noqa: E402
from training.scoring import ImageFiles, statistics  # noqa: E402

BATCH = 64


def make_statistics(dims, seed, samples_per_dim=2):
    """(mu, sigma) of correlated samples whose variances fall over four decades, as network features do."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal([dims, dims]))[0]
    x = rng.standard_normal([samples_per_dim * dims, dims]) * np.logspace(0, -2, dims) @ basis
    return x.mean(axis=0), np.cov(x.T)


def sqrtm_distance(mu, sigma, mu_r, sigma_r):
    """The textbook form."""
    root = scipy.linalg.sqrtm(sigma @ sigma_r)
    return float(np.square(mu - mu_r).sum() + np.trace(sigma) + np.trace(sigma_r) - 2 * np.trace(root).real)


METHODS = {'sqrtm (SciPy)': sqrtm_distance,
           'frechet_distance': frechet_distance,
           'frechet_distance, SVD only': lambda *args: frechet_distance(*args, tolerance=0)}


def measure_distance(dims, repeats):
    """A row for each method: seconds, ratio to the first method, value, relative difference from the last."""
    pair = (*make_statistics(dims, 1), *make_statistics(dims, 2))
    values = {}

    def task(name):
        def run():
            values[name] = METHODS[name](*pair)
        return run
    seconds = alternate({name: task(name) for name in METHODS}, repeats)
    first, last = list(METHODS)[0], list(METHODS)[-1]
    return [dict(method=name, seconds=seconds[name], ratio=seconds[name] / seconds[first], value=values[name],
                 difference=abs(values[name] / values[last] - 1)) for name in METHODS]


def write_images(folder, count, size):
    """`count` smooth random PNG files."""
    rng = np.random.default_rng(0)
    for i in range(count):
        small = PIL.Image.fromarray(rng.integers(0, 256, [8, 8, 3], dtype=np.uint8))
        small.resize([size, size], PIL.Image.Resampling.BICUBIC).save(f'{folder}/{i:06d}.png')


def measure_pass(count, size, repeats, device):
    """A row for decoding alone, for the network alone and for the pass that overlaps them."""
    torch.manual_seed(0)
    detector = InceptionDetector('random', 'random', device, InceptionV3().state_dict())
    with tempfile.TemporaryDirectory() as folder:
        write_images(folder, count, size)
        dataset = open_images(folder)
        decoded = list(image_batches(dataset, range(count), BATCH))

        def network():
            for images in decoded:
                detector(images)

        seconds = alternate({
            'decoding': lambda: list(image_batches(dataset, range(count), BATCH)),
            'network': network,
            'both and the statistics':
                lambda: statistics(ImageFiles(dataset), detector, ['fid'], BATCH, progress=False),
        }, repeats, device)
    whole = seconds['both and the statistics']
    return [dict(part=part, seconds=s, images_per_second=count / s, share=s / whole) for part, s in seconds.items()]


@click.command()
@click.option('--dims', help='Number of features', type=int, default=2048, show_default=True)
@click.option('--repeats', help='Runs of each; the median counts', type=int, default=3, show_default=True)
@click.option('--images', help='Images of the pass', type=int, default=128, show_default=True)
@click.option('--size', help='Their resolution', type=int, default=32, show_default=True)
@click.option('--out', help='File for the results as JSON', metavar='JSON', default=None)
def main(dims, repeats, images, size, out):
    """Time the Fréchet distance and a pass over images."""
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    rows = measure_distance(dims, repeats)
    report(f'Fréchet distance of {dims} features', rows, dict(dims=dims, repeats=repeats, scipy=scipy.__version__))
    passes = measure_pass(images, size, repeats, device)
    settings = dict(dims=dims, repeats=repeats, images=images, size=size, batch=BATCH, scipy=scipy.__version__,
                    distance=rows)
    report(f'A pass over {images} PNG files of {size}×{size} with Inception', passes, settings, out, device)


if __name__ == '__main__':
    main()
