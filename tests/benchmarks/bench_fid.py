"""Time of the Fréchet distance against the same with SciPy's sqrtm, in one run.

    python tests/benchmarks/bench_fid.py [--dims 2048] [--repeats 3]

Prints a table (least seconds of the repeats, ratio to sqrtm, difference from the SVD) and the same as one line of JSON.
"""

import json
import os
import pathlib
import platform
import sys
import time

import click
import numpy as np
import scipy
import scipy.linalg

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from training.metric_fid import frechet_distance  # noqa: E402


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


def measure(dims, repeats):
    """A list of rows: method, least seconds, ratio to the first method, value, relative difference from the last."""
    pair = (*make_statistics(dims, 1), *make_statistics(dims, 2))
    seconds, values = {m: [] for m in METHODS}, {}
    for _ in range(repeats):
        for name, method in METHODS.items():
            start = time.perf_counter()
            values[name] = method(*pair)
            seconds[name].append(time.perf_counter() - start)
    least = {m: min(s) for m, s in seconds.items()}
    first, last = next(iter(METHODS)), list(METHODS)[-1]
    return [dict(method=m, seconds=least[m], ratio=least[m] / least[first], value=values[m],
                 difference=abs(values[m] / values[last] - 1)) for m in METHODS]


@click.command()
@click.option('--dims', help='Number of features', type=int, default=2048, show_default=True)
@click.option('--repeats', help='Runs of each method; the fastest counts', type=int, default=3, show_default=True)
def main(dims, repeats):
    """Compare the Fréchet distance with SciPy's sqrtm."""
    rows = measure(dims, repeats)
    print(f'{"method":28} {"seconds":>8} {"ratio":>7} {"value":>14} {"difference":>11}')
    for r in rows:
        print(f'{r["method"]:28} {r["seconds"]:8.2f} {r["ratio"]:7.3f} {r["value"]:14.8g} {r["difference"]:11.1e}')
    print(json.dumps(dict(dims=dims, repeats=repeats, cores=os.cpu_count(), machine=platform.processor(),
                          python=platform.python_version(), numpy=np.__version__, scipy=scipy.__version__, rows=rows)))


if __name__ == '__main__':
    main()
