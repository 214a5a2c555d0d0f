"""Scores: the record, exact cases, slow plain references, independence of batch size and blocks."""

import itertools

import numpy as np
import pytest
import torch

from dnnlib import UserError
from training import metric_fid, metric_is, metric_kid, metric_pr, metrics
from training.detectors import Detector, PixelDetector
from training.metric_collectors import Features, Moments, SplitProbabilities


class TableDetector(Detector):
    """Takes features and probabilities from tables; an image's first pixels are its row number."""

    def __init__(self, features, probs=None, name='table'):
        super().__init__(name, 'table-digest', 'cpu', has_probs=probs is not None)
        self.table, self.prob_table = torch.as_tensor(features), probs

    def run(self, rgb, features, probs):
        rows = rgb[:, 0, 0, 0].long() * 256 + rgb[:, 0, 0, 1].long()
        return self.table[rows], self.prob_table[rows] if probs else None


def numbered_images(n, batch):
    """n images as batches, each carrying its number in two pixels."""
    images = torch.zeros([n, 3, 2, 2], dtype=torch.uint8)
    images[:, :, 0, 0] = (torch.arange(n) // 256).to(torch.uint8)[:, None]
    images[:, :, 0, 1] = (torch.arange(n) % 256).to(torch.uint8)[:, None]
    return images.split(batch)


def rotation(dims, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal([dims, dims]))[0]


# -- FID

def test_frechet_distance_equals_record(golden):
    g = golden('fid')
    for i, expected in enumerate(g.meta['fid']):
        args = [g.arrays[f'{name}_{i}'] for name in ('mu', 'sigma', 'mu_ref', 'sigma_ref')]
        for tolerance in (metric_fid.TOLERANCE, 0):
            assert metric_fid.frechet_distance(*args, tolerance=tolerance) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize('rank, rank_r', [(60, 60), (60, 20), (20, 60), (20, 20), (0, 60)])
def test_frechet_distance_exact_for_commuting_covariances(rank, rank_r):
    """With one eigenbasis the trace of the root is Σ√(λ·λ_r), of whatever rank."""
    Q = rotation(60)
    v, v_r = np.logspace(1, -4, 60) * (np.arange(60) < rank), np.logspace(-3, 0, 60) * (np.arange(60) < rank_r)
    d = metric_fid.frechet_distance(np.ones(60), (Q * v) @ Q.T, np.zeros(60), (Q * v_r) @ Q.T)
    assert d == pytest.approx(60 + v.sum() + v_r.sum() - 2 * np.sqrt(v * v_r).sum(), rel=1e-10)


def test_frechet_distance_of_few_samples():
    """More dimensions than samples: equal to the distance within the space that the samples span."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal([2, 30, 40]) * np.logspace(0, -2, 40)
    wide = [np.concatenate([a, np.zeros([30, 200])], axis=1) @ rotation(240) for a in (x, y)]
    args = [f(a) for a in (x, y) for f in (lambda z: z.mean(axis=0), lambda z: np.cov(z.T))]
    args_wide = [f(a) for a in wide for f in (lambda z: z.mean(axis=0), lambda z: np.cov(z.T))]
    narrow = metric_fid.frechet_distance(*args)
    assert metric_fid.frechet_distance(*args_wide) == pytest.approx(narrow, rel=1e-10)
    assert metric_fid.frechet_distance(*args, tolerance=0) == pytest.approx(narrow, rel=1e-10)


def test_frechet_distance_of_itself_is_zero():
    sigma = np.cov((np.random.default_rng(0).standard_normal([90, 50]) * np.logspace(0, -6, 50) @ rotation(50)).T)
    assert metric_fid.frechet_distance(np.ones(50), sigma, np.ones(50), sigma) < 1e-12


def test_fast_singular_values_know_their_error():
    for smallest, trusted in ((1e-3, True), (1e-9, False)):
        M = rotation(40, 1) * np.logspace(0, np.log10(smallest), 40) @ rotation(40, 2)
        values, error = metric_fid.singular_values_fast(M)
        exact = np.linalg.svd(M, compute_uv=False).sum()
        assert (error < 1e-12) == trusted
        assert abs(values.sum() - exact) < 10 * error


# -- the pass over the images

def test_statistics_equal_numpy_and_ignore_the_batch_size():
    x = torch.randn([301, 7], generator=torch.Generator().manual_seed(0)) * 3 + 5
    wanted = x.numpy().astype(np.float64)
    for batch in (1, 64, 301):
        stats = metrics.accumulate(numbered_images(301, batch), TableDetector(x), ['fid', 'pr'], 301)
        np.testing.assert_allclose(stats['mu'], wanted.mean(axis=0), rtol=1e-13)
        np.testing.assert_allclose(stats['sigma'], np.cov(wanted.T), rtol=1e-12, atol=1e-12)
        np.testing.assert_array_equal(stats['features'], x.numpy())
        assert stats['mu'].dtype == stats['sigma'].dtype == np.float64 and stats['num'] == 301


def test_kept_features_are_a_random_ordered_subset():
    x = torch.arange(500.)[:, None]
    for batch in (1, 33):
        kept = Features(500, limit=100)
        for part in x.split(batch):
            kept.update(part)
        rows = kept.result()['features'][:, 0]
        assert len(rows) == 100 and (np.diff(rows) > 0).all()
        assert rows.min() < 50 and rows.max() > 450  # spread over the whole set, not its beginning


def test_too_many_or_too_few_batches_are_a_programming_error():
    with pytest.raises(ValueError, match='got 30 images where 31'):
        metrics.accumulate(numbered_images(30, 8), TableDetector(torch.randn([30, 2])), ['fid'], 31)


# -- IS

def plain_inception_score(p, splits=10):
    scores = []
    for i in range(splits):
        part = p[len(p) * i // splits:len(p) * (i + 1) // splits]
        kl = [sum(q * np.log(q / m) for q, m in zip(row, part.mean(axis=0)) if q > 0) for row in part]
        scores.append(np.exp(np.mean(kl)))
    return np.mean(scores), np.std(scores)


@pytest.mark.parametrize('n', [10, 103])
def test_inception_score_equals_the_plain_form(n):
    p = torch.randn([n, 12], dtype=torch.float64, generator=torch.Generator().manual_seed(0)).mul(3).softmax(dim=1)
    p[::4] = torch.eye(12, dtype=torch.float64)[torch.arange(len(p[::4])) % 12]
    expected = plain_inception_score(p.numpy())
    for batch in (7, n):
        sums = SplitProbabilities(n)
        for part in p.split(batch):
            sums.update(part)
        got = metric_is.score_is(sums.result())
        assert (got['IS'], got['IS_std']) == pytest.approx(expected, rel=1e-12)


def test_inception_score_bounds():
    """It is 1 if all images look alike, and the number of classes if each split shows all of them with certainty."""
    for p, expected in ((np.full([50, 5], 0.2), 1), (np.eye(5)[np.arange(50) % 5], 5)):
        sums = SplitProbabilities(50)
        sums.update(torch.from_numpy(p))
        assert metric_is.score_is(sums.result()) == pytest.approx({'IS': expected, 'IS_std': 0}, abs=1e-12)


# -- KID

def plain_mmd2(x, y):
    def k(a, b):
        return (a @ b / len(a) + 1) ** 3
    n, m = len(x), len(y)
    return (sum(k(a, b) for a, b in itertools.permutations(x, 2)) / (n * (n - 1))
            + sum(k(a, b) for a, b in itertools.permutations(y, 2)) / (m * (m - 1))
            - 2 * sum(k(a, b) for a in x for b in y) / (n * m))


def test_kernel_distance_equals_the_plain_form():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal([15, 4]), rng.standard_normal([12, 4]) + 1
    assert metric_kid.mmd2_unbiased(x, y) == pytest.approx(plain_mmd2(x, y), rel=1e-12)
    mean, std = metric_kid.kernel_distance(x, y, seed=3, num_subsets=4, subset_size=12)
    subsets = np.random.RandomState(3)
    values = [plain_mmd2(*(f[subsets.choice(len(f), 12, replace=False)] for f in (x, y))) for _ in range(4)]
    assert (mean, std) == pytest.approx((np.mean(values), np.std(values)), rel=1e-12)


def test_kernel_distance_is_unbiased_and_grows_with_the_shift():
    rng = np.random.default_rng(0)
    x = rng.standard_normal([3000, 8])
    same, std = metric_kid.kernel_distance(x, rng.standard_normal([3000, 8]), num_subsets=20)
    far, _ = metric_kid.kernel_distance(x, rng.standard_normal([3000, 8]) + 0.5, num_subsets=20)
    assert abs(same) < 3 * std < far


# -- precision and recall

def plain_precision_recall(generated, real, k):
    def radius(points, i):
        return sorted(np.linalg.norm(points[i] - p) for j, p in enumerate(points) if j != i)[k - 1]

    def covered(points, centres):
        radii = [radius(centres, j) for j in range(len(centres))]
        return np.mean([any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radii)) for p in points])
    return covered(generated, real), covered(real, generated)


@pytest.mark.parametrize('block', [1, 17, 1000])
def test_precision_recall_equals_the_plain_form(block):
    rng = np.random.default_rng(0)
    real = rng.standard_normal([60, 3]) * [3, 1, 1] + 100
    generated = rng.standard_normal([45, 3]) * [1, 1, 3] + 100
    real[20:26], generated[10:16] = real[20], real[20]  # copies of each other, whose balls have radius 0
    expected = plain_precision_recall(generated, real, 3)
    assert 0.1 < min(expected) and max(expected) < 0.95
    got = metric_pr.precision_recall(torch.from_numpy(generated), torch.from_numpy(real), block=block)
    assert got == pytest.approx(expected, abs=1e-12)


def test_copies_have_distance_0():
    """Rounding must not put an image outside the ball, of radius 0, around its own copies."""
    x = (torch.rand([50, 64], generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 100).repeat(5, 1)
    assert metric_pr.precision_recall(x[:50].repeat(5, 1), x.flip(0)) == (1, 1)


# -- the registry, names, files

def test_every_metric_scores():
    g = torch.Generator().manual_seed(0)
    x, probs = torch.randn([1100, 4], generator=g), torch.randn([1100, 6], generator=g).softmax(dim=1)
    detector = TableDetector(x, probs)
    names = list(metrics.METRICS)
    stats = metrics.accumulate(numbered_images(1100, 256), detector, names, 1100)
    ref = metrics.accumulate(numbered_images(1100, 256), TableDetector(x + 0.1, probs), names, 1100)
    values = metrics.score(names, stats, ref, seed=1)
    assert list(values) == [score for metric in metrics.METRICS.values() for score in metric.scores]
    assert list(values)[:7] == ['FID', 'IS', 'IS_std', 'KID', 'KID_std', 'precision', 'recall']
    assert all(np.isfinite(v) for v in values.values())
    assert values['FID'] == pytest.approx(4 * 0.1 ** 2, rel=1e-4)


def test_labels_say_fid_for_inception_only():
    pixels, table = PixelDetector('cpu'), TableDetector(torch.zeros([1, 1]), name='file:mine')
    assert metrics.label('FID', pixels) == 'FD-pixels'
    assert metrics.label('KID_std', table) == 'KID-mine_std'
    assert metrics.label('FID', TableDetector(torch.zeros([1, 1]), name='inception-2015-12-05')) == 'FID'


def test_unknown_metric():
    assert metrics.parse_metrics('fid, kid,fid') == ['fid', 'kid']
    with pytest.raises(UserError, match="no metric 'fidd'; choose from fid,is,kid,pr"):
        metrics.parse_metrics('fid,fidd')


@pytest.mark.parametrize('name', metrics.METRICS)
def test_too_few_images(name):
    detector = TableDetector(torch.zeros([1, 1]), torch.zeros([1, 1]))
    least = metrics.METRICS[name].min_images
    metrics.check_images([name], least, detector)
    with pytest.raises(UserError, match=f'needs at least {least} images and there are {least - 1}'):
        metrics.check_images([name], least - 1, detector)


def test_class_probabilities_are_needed():
    with pytest.raises(UserError, match="'is' needs class probabilities, which the detector 'pixels' does not give"):
        metrics.check_images(['is'], 100, PixelDetector('cpu'))


def test_nan_features_name_the_image():
    x = torch.zeros([20, 3])
    x[13, 1] = torch.nan
    with pytest.raises(UserError, match='NaN or infinite features for image number 13'):
        metrics.accumulate(numbered_images(20, 8), TableDetector(x), ['fid'], 20)


def test_another_number_of_features():
    accumulator = metrics.Accumulator(TableDetector(torch.zeros([20, 3])), ['fid'], 20, num_features=5)
    with pytest.raises(UserError, match="'table' gives 3 features and the reference has 5"):
        accumulator.add(*numbered_images(20, 20))


@pytest.fixture
def statistics(tmp_path):
    """Writes an .npz that suits `PixelDetector`, with changes; None removes an array."""
    def write(**changes):
        arrays = {'mu': np.zeros(192), 'sigma': np.eye(192), **changes}
        path = tmp_path / 'ref.npz'
        np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
        return path
    return write


def test_statistics_survive_the_file(tmp_path):
    detector = TableDetector(torch.randn([50, 6]))
    stats = metrics.accumulate(numbered_images(50, 8), detector, ['fid', 'pr'], 50)
    metrics.save_statistics(tmp_path / 'deep' / 'er' / 'ref.npz', stats)
    ref = metrics.load_reference(tmp_path / 'deep' / 'er' / 'ref.npz', ['fid', 'pr'], detector)
    for name in ('mu', 'sigma', 'features'):
        np.testing.assert_array_equal(ref[name], stats[name])
    assert ref['features'].dtype == np.float32 and str(ref['detector']) == 'table' and ref['num'] == 50


def test_destination_that_is_a_folder(tmp_path):
    with pytest.raises(UserError, match='is a folder; give the name of an .npz file'):
        metrics.save_statistics(tmp_path, {})


@pytest.mark.parametrize('name, said', [
    ('set.zip', 'set.zip is the data set itself'),
    ('link.npz', 'link.npz is the data set itself'),
    ('network.safetensors', 'does not end in .npz, .* such as .*/network.npz$'),
    ('new.txt', 'new.txt does not end in .npz'),
    ('others.npz', 'others.npz exists and does not hold statistics'),
    ('empty.npz', 'empty.npz exists and does not hold statistics'),
])
def test_destination_that_is_something_else(tmp_path, name, said):
    """A mistake in --dest is refused and costs no file."""
    for other in ('set.zip', 'network.safetensors'):
        (tmp_path / other).write_bytes(b'precious')
    (tmp_path / 'link.npz').symlink_to(tmp_path / 'set.zip')
    (tmp_path / 'empty.npz').touch()
    np.savez(tmp_path / 'others.npz', images=np.zeros(3))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match=said):
        metrics.check_destination(tmp_path / name, tmp_path / 'set.zip')
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_statistics_may_be_replaced(statistics):
    metrics.check_destination(statistics(), data=None)


def test_edm_statistics_are_read(statistics):
    path = statistics()
    assert metrics.load_reference(path, ['fid'], PixelDetector('cpu'))['sigma'].shape == (192, 192)
    with pytest.raises(UserError, match="has no array 'features', which pr needs; .* --metrics=fid,pr$"):
        metrics.load_reference(path, ['fid', 'pr'], PixelDetector('cpu'))


@pytest.mark.parametrize('changes, message', [
    (dict(mu=None), "has no array 'mu', which fid needs; .* --metrics=fid$"),
    (dict(sigma=np.eye(5)), "the array 'sigma' .* is not finite numbers of shape \\[192, 192\\]"),
    (dict(mu=np.full(192, np.nan)), "the array 'mu' .* is not finite numbers"),
    (dict(mu=np.zeros(3), sigma=np.eye(3)), "has 3 features and the detector 'pixels' gives 192"),
    (dict(mu=np.array(['a'] * 192)), "the array 'mu' .* is not finite numbers"),
    (dict(mu=np.float64(0)), "the array 'mu' .* is not finite numbers"),
    (dict(mu=np.array([None] * 192)), 'is not an .npz file of statistics'),
    (dict(detector=np.str_('inception-2015-12-05')), "made with the detector 'inception-2015-12-05'"),
])
def test_unsuitable_statistics(statistics, changes, message):
    with pytest.raises(UserError, match=message):
        metrics.load_reference(statistics(**changes), ['fid'], PixelDetector('cpu'))


def test_features_without_dimensions(statistics):
    with pytest.raises(UserError, match="the array 'features' .* is not finite numbers"):
        metrics.load_reference(statistics(features=np.float32(0)), ['kid'], PixelDetector('cpu'))


def test_too_few_reference_features(statistics):
    path = statistics(features=np.zeros([7, 192], np.float32))
    with pytest.raises(UserError, match="'kid' needs at least 1000 images in .*ref.npz and there are 7"):
        metrics.load_reference(path, ['kid'], PixelDetector('cpu'))


@pytest.mark.parametrize('changes, size', [
    ({}, None), (dict(channels=np.int64(3), resolution=np.int64(32)), (3, 32)), (dict(channels=3), None),
    (dict(channels=np.zeros(2, int), resolution=np.int64(32)), None),
    (dict(channels=np.str_('x'), resolution=np.float64('nan')), None),
])
def test_size_of_the_images(statistics, changes, size):
    """This program's files state the size; EDM's do not, and odd values count as none."""
    ref = metrics.load_reference(statistics(**changes), ['fid'], PixelDetector('cpu'))
    assert metrics.size_of(ref) == size


def test_damaged_statistics(statistics, tmp_path):
    whole = statistics().read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    for content in (b'', whole[:-50], whole[:1000], bytes(flipped), b'<!DOCTYPE html><html></html>', b'\x93NUMPY'):
        path = tmp_path / 'bad.npz'
        path.write_bytes(content)
        with pytest.raises(UserError, match='bad.npz is not an .npz file of statistics'):
            metrics.load_reference(path, ['fid'], PixelDetector('cpu'))


def test_a_single_array_is_no_statistics(tmp_path):
    np.save(tmp_path / 'mu.npy', np.zeros(192))
    with pytest.raises(UserError, match='is not an .npz file of statistics'):
        metrics.load_reference(tmp_path / 'mu.npy', ['fid'], PixelDetector('cpu'))


def test_missing_reference():
    metrics.check_reference(['is'], None)
    with pytest.raises(UserError, match="'fid' compares with a reference; give --ref"):
        metrics.check_reference(['is', 'fid'], None)


@pytest.mark.parametrize('collector', [Moments, Features, SplitProbabilities])
def test_a_collector_continues_from_its_state(collector):
    """To the last bit, the result is that of one that was not interrupted."""
    x = torch.rand([40, 5], generator=torch.Generator().manual_seed(0)).softmax(dim=1)
    whole, first, second = (collector(40) for _ in range(3))
    for part in x.split(17):
        whole.update(part)
    first.update(x[:17])
    second.restore(first.state(), 17, 'cpu')
    for part in x[17:].split(17):
        second.update(part)
    expected, found = whole.result(), second.result()
    assert expected.keys() == found.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


def test_a_detector_sees_batches_of_one_size():
    """Whatever batches images come in, since the last bits of features depend on it; all that remains in one."""
    sizes = []

    class Spy(PixelDetector):
        def run(self, rgb, features, probs):
            sizes.append(len(rgb))
            return super().run(rgb, features, probs)
    images = torch.randint(256, [300, 3, 8, 8], dtype=torch.uint8)
    accumulator = metrics.Accumulator(Spy('cpu'), ['fid'], 300, 128)
    for batch in images.split(128):
        accumulator.add(batch)
    assert sizes == [64] * 4 + [44] and accumulator.index == 300
