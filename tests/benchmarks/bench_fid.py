"""Speed of scoring: the Fréchet distance against SciPy's sqrtm, and a pass of images through Inception.

    python tests/benchmarks/bench_fid.py [--dims 2048] [--repeats 3] [--images 256] [--total=50000] [--out=FILE.json]

The detector is Inception's graph with random weights, which takes as long as with the public ones. In the second table,
`share` is a part's time over that of the whole pass; 1 for the network means that decoding is hidden behind it. The
table's last rows score --total images from a zip once, at fid.py's batch size: elapsed seconds from the first byte to
the distance, without start-up and download. `target` is in proportion to 20 s for 50,000 images, which a GPU should
stay below.
"""

import pathlib
import sys
import tempfile
import time

import click
import numpy as np
import PIL.Image
import scipy
import scipy.linalg
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from tests.benchmarks.bench_train import write_zip  # noqa: E402
from tests.benchmarks.report import Table, alternate, report  # noqa: E402
from training.detectors import InceptionDetector, scoring_batch  # noqa: E402
from training.inception import InceptionV3  # noqa: E402
from training.metric_fid import frechet_distance  # noqa: E402
from training.metric_images import image_batches, open_images  # noqa: E402
from training.metrics import score  # noqa: E402
from training.scoring import ImageFiles, statistics  # noqa: E402

BATCH = 64
TARGET_SECONDS, TARGET_IMAGES = 20, 50_000


def make_statistics(dims, seed, samples_per_dim=2):
    """(mu, sigma) of correlated samples whose variances fall over four decades, as network features do."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal([dims, dims]))[0]
    x = rng.standard_normal([samples_per_dim * dims, dims]) * np.logspace(0, -2, dims) @ basis
    return x.mean(axis=0), np.cov(x.T)


def sqrtm_distance(mu, sigma, mu_r, sigma_r):
    """The Fréchet distance by the textbook formula, with SciPy's sqrtm."""
    root = scipy.linalg.sqrtm(sigma @ sigma_r)
    return float(np.square(mu - mu_r).sum() + np.trace(sigma) + np.trace(sigma_r) - 2 * np.trace(root).real)


METHODS = {'sqrtm (SciPy)': sqrtm_distance,
           'frechet_distance': frechet_distance,
           'frechet_distance, SVD only': lambda *args: frechet_distance(*args, tolerance=0)}


def measure_distance(dims, repeats):
    """A row per method: seconds, ratio to the first method's, value, relative difference from the last method's."""
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
    """Write `count` smooth random images as PNG files."""
    rng = np.random.default_rng(0)
    for i in range(count):
        small = PIL.Image.fromarray(rng.integers(0, 256, [8, 8, 3], dtype=np.uint8))
        small.resize([size, size], PIL.Image.Resampling.BICUBIC).save(f'{folder}/{i:06d}.png')


def random_inception(device):
    """The Inception detector with random weights."""
    torch.manual_seed(0)
    return InceptionDetector('random', 'random', device, InceptionV3().state_dict())


def measure_pass(count, size, repeats, device):
    """Rows for decoding alone, for the network alone, and for the whole pass, which overlaps them."""
    detector = random_inception(device)
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
    return [row(part, count, BATCH, s, s / whole) for part, s in seconds.items()]


def row(part, count, batch, seconds, share=None, target=None):
    """A row of the second table."""
    return dict(part=part, images=count, batch=batch, seconds=seconds, images_per_second=count / seconds, share=share,
                target=target)


def measure_scoring(count, size, device):
    """Yield rows for a whole scoring, as fid.py calc does it with a zip and reference statistics, after its parts."""
    detector, batch = random_inception(device), scoring_batch(device)
    mu, sigma = make_statistics(detector.num_features, 1)
    with tempfile.TemporaryDirectory() as folder:
        write_zip(f'{folder}/images.zip', count, size)
        warm_up, _ = detector(torch.zeros([min(batch, count), 3, size, size], dtype=torch.uint8))
        warm_up.cpu()  # waits, so that loading kernels is not timed, as in the rows above
        start = time.perf_counter()
        stats = statistics(ImageFiles(open_images(f'{folder}/images.zip')), detector, ['fid'], batch, progress=False)
        seconds = time.perf_counter() - start
    yield row('scoring: reading, features, statistics', count, batch, seconds)
    start = time.perf_counter()
    score(['fid'], stats, dict(mu=mu, sigma=sigma))
    distance = time.perf_counter() - start
    yield row('scoring: distance', count, batch, distance, distance / (seconds + distance))
    yield row('scoring, elapsed', count, batch, seconds + distance, 1.0, TARGET_SECONDS * count / TARGET_IMAGES)


@click.command()
@click.option('--dims', help='Number of features', type=int, default=2048, show_default=True)
@click.option('--repeats', help='Repeats per measurement; the median counts', type=int, default=3, show_default=True)
@click.option('--images', help='Images in the pass', type=int, default=128, show_default=True)
@click.option('--total', help='Images in the whole scoring; 0 = skip it  [default: CPU 16, CUDA 10000]', type=int,
              default=None)
@click.option('--size', help='Image resolution', type=int, default=32, show_default=True)
@click.option('--out', help='Also write the report here', metavar='JSON', default=None)
def main(dims, repeats, images, total, size, out):
    """Time the Fréchet distance, a pass over images, and a whole scoring."""
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    rows = measure_distance(dims, repeats)
    report(f'Fréchet distance of {dims} features', rows, dict(dims=dims, repeats=repeats, scipy=scipy.__version__))
    total = (10_000 if device == 'cuda' else 16) if total is None else total
    settings = dict(dims=dims, repeats=repeats, size=size, scipy=scipy.__version__, distance=rows)
    table = Table(f'A pass over PNG files of {size}×{size} with Inception, and a scoring', settings, out, device)
    table.add(*measure_pass(images, size, repeats, device))
    if total:
        for part in measure_scoring(total, size, device):
            table.add(part)
    table.finish()


if __name__ == '__main__':
    main()
