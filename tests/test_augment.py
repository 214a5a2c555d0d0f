"""Augmentation: the recorded images and labels, the plain form of the resampling, and what must never happen."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dnnlib import UserError
from tests.commands import SMALL, invoke, refused
from training import affine, augment
from training.augment import TRAIN_AUGMENT, TRANSFORMS, AugmentPipe, Transform
from training.snapshot import build_network, read_snapshot
from warm.systems import SYSTEMS

RECORDS = ['augment-all', 'augment-blit', 'augment-color', 'augment-geometry', 'augment-train']
NAMES = [t.name for t in TRANSFORMS]
BLITS = [t.name for t in TRANSFORMS if t.kind == 'blit']
GEOMETRY = [t.name for t in TRANSFORMS if t.kind == 'geometry']
COLOURS = [t.name for t in TRANSFORMS if t.kind == 'colour']


def some_images(count=4, channels=3, height=16, width=None):
    generator = torch.Generator().manual_seed(3)
    return torch.rand([count, channels, height, width or height], generator=generator) * 2 - 1


def augmented(images, seed=0, **settings):
    torch.manual_seed(seed)
    return AugmentPipe(**settings)(images)


def all_on(names=NAMES):
    return dict.fromkeys(names, 1)


# -- recorded values

# Moving pixels is exact, and so are its labels; elsewhere, normal variates have another last digit on other CPUs.
PIXEL_ERRORS = {'augment-blit': 0, 'augment-color': 2e-5}


@pytest.mark.parametrize('name', RECORDS)
def test_images_and_labels_equal_the_recorded_ones(golden, name):
    record = golden(name)
    images = torch.from_numpy(record.images_u8).to(torch.float32) / 127.5 - 1
    out, labels = augmented(images, record.meta['seed'], **record.meta['kwargs'])
    assert out.dtype == labels.dtype == torch.float32
    np.testing.assert_allclose(out, record.out, rtol=0, atol=PIXEL_ERRORS.get(name, 1e-4))
    np.testing.assert_allclose(labels, record.labels, rtol=0, atol=0 if name == 'augment-blit' else 1e-6)


def test_training_settings_are_the_recorded_ones(golden):
    assert {'p': 0.12, **TRAIN_AUGMENT} == golden('augment-train').meta['kwargs']
    assert AugmentPipe(**TRAIN_AUGMENT).label_dim == 9


# -- labels and the table of transforms

@pytest.mark.parametrize('transform', TRANSFORMS, ids=NAMES)
def test_label_columns_are_as_many_as_the_table_says(transform):
    images = some_images(count=32)
    out, labels = augmented(images, **{transform.name: 1})
    assert labels.shape == (32, transform.columns) and AugmentPipe(**{transform.name: 1}).label_dim == transform.columns
    assert out.shape == images.shape and not torch.equal(out, images) and (labels != 0).any(dim=0).all()


def test_label_columns_are_those_of_the_enabled_transforms():
    assert AugmentPipe(**all_on()).label_dim == sum(t.columns for t in TRANSFORMS)
    assert AugmentPipe().label_dim == 0
    out, labels = AugmentPipe()(some_images())
    assert torch.equal(out, some_images()) and labels.shape == (4, 0)


@pytest.mark.parametrize('names, tolerance', [(BLITS, 0), (COLOURS, 0), (GEOMETRY, 3e-5)])
@pytest.mark.parametrize('channels', [1, 3])
def test_probability_0_changes_nothing(names, tolerance, channels):
    """Bit for bit, save for the round-off of filtering up and down where a geometric transform is enabled."""
    images = some_images(channels=channels, height=32)
    out, labels = augmented(images, p=0, **all_on(names))
    torch.testing.assert_close(out, images, rtol=0, atol=tolerance)
    assert (labels == 0).all() and labels.shape[1] > 0


@pytest.mark.parametrize('name', NAMES)
def test_probability_is_that_of_the_coin(name):
    """Labels of n images are nonzero as often as p allows, within 5 standard deviations."""
    n, p = 20000, 0.3
    _, labels = augmented(some_images(1, height=2).expand(n, -1, -1, -1), p=p, **{name: 1})
    share = (labels != 0).any(dim=1).double().mean()
    if name == 'translate_int':  # may round to a move by 0 pixels
        assert share <= p + 5 * math.sqrt(p * (1 - p) / n)
    else:
        chance = p * {'xflip': 0.5, 'yflip': 0.5, 'lumaflip': 0.5, 'rotate_int': 0.75}.get(name, 1)
        assert share == pytest.approx(chance, abs=5 * math.sqrt(chance * (1 - chance) / n))


def test_training_mirrors_half_the_images_whatever_the_probability():
    n = 20000
    _, labels = augmented(some_images(1, height=2).expand(n, -1, -1, -1), p=0.01, xflip=1e8)
    assert labels.mean() == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(n))


def test_settings_rebuild_the_pipe():
    pipe = AugmentPipe(0.4, xflip=1, scale=1, hue=1, hue_max=0.5)
    assert pipe.init_kwargs['p'] == 0.4 and pipe.init_kwargs['xflip'] == 1 and pipe.init_kwargs['hue_max'] == 0.5
    again = AugmentPipe(**pipe.init_kwargs)
    torch.manual_seed(1)
    a = pipe(some_images())
    torch.manual_seed(1)
    b = again(some_images())
    assert again.init_kwargs == pipe.init_kwargs and torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


# -- images

def test_flips_and_turns_move_pixels_as_labelled():
    images = some_images(count=64)
    for name, dim in (('xflip', 3), ('yflip', 2)):
        out, labels = augmented(images, **{name: 1})
        for before, after, flipped in zip(images, out, labels[:, 0]):
            assert torch.equal(after, before.flip(dim - 1) if flipped else before)
    out, labels = augmented(images, rotate_int=1)
    quarters = {(0, 0): 0, (1, 0): 1, (1, 1): 2, (0, 1): 3}
    turns = [quarters[tuple(row)] for row in labels.int().tolist()]
    assert set(turns) == {0, 1, 2, 3}
    for before, after, turn in zip(images, out, turns):
        assert torch.equal(after, before.rot90(turn, [1, 2]))


def test_translation_moves_right_and_up_over_the_mirrored_image():
    images = some_images(count=16, height=16, width=24)
    out, labels = augmented(images, translate_int=1)
    for before, after, (x, y) in zip(images, out, labels):
        tx, ty = round(x.item() * 24 * 0.125), round(y.item() * 16 * 0.125)
        padded = F.pad(before[None], (8, 8, 8, 8), mode='reflect')[0]
        assert torch.equal(after, padded[:, 8 + ty:8 + ty + 16, 8 - tx:8 - tx + 24])


@pytest.mark.parametrize('height, width', [(16, 16), (12, 20), (9, 8)])
def test_warp_equals_its_plain_form(height, width):
    """It equals padding, zero-insertion, convolution, lookup and convolution, done one after the other."""
    images = some_images(count=6, height=height, width=width).double()
    generator = torch.Generator().manual_seed(7)
    M = torch.eye(3).repeat(6, 1, 1)
    M[:, :2, :2] += 0.3 * torch.randn([6, 2, 2], generator=generator)
    M[:, :2, 2] = 4 * torch.randn([6, 2], generator=generator)
    M[5, :2, :2] *= 20  # looks beyond the mirrored canvas
    out = affine.warp(images, M)
    np.testing.assert_allclose(out, plain_warp(images, M.double()), rtol=0, atol=1e-5)
    assert (out[5] == 0).any()


def plain_warp(images, M):
    """`affine.warp` by its definition, step by step."""
    N, C, H, W = images.shape
    h = torch.tensor(affine.SYM6, dtype=images.dtype)
    x = F.pad(images, (W - 1, W - 1, H - 1, H - 1), mode='reflect').flatten(0, 1)[:, None]
    z = x.new_zeros([N * C, 1, 2 * x.shape[2], 2 * x.shape[3]])
    z[:, :, ::2, ::2] = x
    # u[n] = Σ_k h[k] z[n + 5 − k]: conv2d correlates, so the filter is flipped.
    z = F.pad(z, (6, 5, 6, 5))
    u = F.conv2d(F.conv2d(z, h.flip(0)[None, None, None, :]), h.flip(0)[None, None, :, None])
    u = u.reshape(N, C, *u.shape[2:])
    px = (torch.arange(-5, 2 * W + 5) + 0.5) / 2 - W / 2
    py = (torch.arange(-5, 2 * H + 5) + 0.5) / 2 - H / 2
    p = torch.stack([*torch.meshgrid(px, py, indexing='xy'), torch.full([len(py), len(px)], 0.75)], dim=-1).double()
    q = torch.einsum('nij,yxj->nyxi', M, p + 0.25)[..., :2] - 0.25
    size = torch.tensor([u.shape[3], u.shape[2]]) / 4  # half of the canvas, in pixels of the image
    v = F.grid_sample(u, q / size, mode='bilinear', padding_mode='zeros', align_corners=False).flatten(0, 1)[:, None]
    return F.conv2d(F.conv2d(v, h[None, None, None, :], stride=(1, 2)), h[None, None, :, None], stride=(2, 1)).reshape(
        images.shape)


def test_filters_are_computed_once():
    """A GPU would need 70 small kernels for them at every step."""
    makers = affine.upsampling_matrix, affine.downsampling_matrix, affine.sample_positions
    augmented(some_images(), **all_on())
    made = [maker.cache_info().misses for maker in makers]
    augmented(some_images(), **all_on())
    assert [maker.cache_info().misses for maker in makers] == made


def test_the_filter_is_orthonormal_under_shifts_by_two():
    h = torch.tensor(affine.SYM6, dtype=torch.float64)
    products = [(h[2 * m:] * h[:12 - 2 * m]).sum() for m in range(6)]
    np.testing.assert_allclose(products, [1, 0, 0, 0, 0, 0], rtol=0, atol=1e-12)
    assert h.sum().item() == pytest.approx(math.sqrt(2), abs=1e-12)


def test_an_image_does_not_depend_on_the_others_in_its_batch():
    images = some_images()
    out, _ = augmented(images, **all_on())
    images[1:] = 0.9
    again, _ = augmented(images, **all_on())
    assert torch.equal(out[0], again[0])


def test_grey_images_get_the_mean_of_the_three_channels():
    grey = some_images(channels=1)
    out, labels = augmented(grey, **all_on(COLOURS))
    colour, colour_labels = augmented(grey.expand(-1, 3, -1, -1), **all_on(COLOURS))
    torch.testing.assert_close(out, colour.mean(dim=1, keepdim=True))
    assert torch.equal(labels, colour_labels)
    out, _ = augmented(grey, **all_on())
    assert out.shape == grey.shape


def test_grey_axis_is_kept_by_hue_and_saturation_and_mirrored_by_lumaflip():
    grey = some_images(channels=1).expand(-1, 3, -1, -1)
    out, _ = augmented(grey, hue=1, saturation=1)
    torch.testing.assert_close(out, grey)
    images = some_images()
    out, labels = augmented(images, seed=1, lumaflip=1)
    sign = 1 - 2 * labels[:, :1, None]
    assert set(sign.flatten().tolist()) == {-1, 1}
    torch.testing.assert_close(out.mean(dim=1), sign * images.mean(dim=1))
    torch.testing.assert_close(out - out.mean(dim=1, keepdim=True), images - images.mean(dim=1, keepdim=True))


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_dtype_is_kept(dtype):
    out, labels = augmented(some_images().to(dtype), **all_on())
    assert out.dtype == dtype and labels.dtype == torch.float32


# -- a transform of one's own, and the flag

def cutout(pipe, images):
    """Grey out the right half of an image: the one function that a new transform needs."""
    w = pipe.gated('cutout', torch.rand([images.shape[0]], device=images.device))
    right = torch.arange(images.shape[3], device=images.device) >= images.shape[3] // 2
    return torch.where((w > 0)[:, None, None, None] & right, pipe.cutout_grey, images), [w]


@pytest.fixture
def with_cutout(monkeypatch):
    line = Transform('cutout', 'blit', 1, cutout, dict(cutout_grey=0.5), strength=2)  # and the one line
    monkeypatch.setattr(augment, 'TRANSFORMS', [*TRANSFORMS[:4], line, *TRANSFORMS[4:]])


def test_a_new_transform_is_one_function_and_one_line(with_cutout):
    images = some_images(count=64)
    out, labels = augmented(images, p=0.5, **augment.training_strengths('cutout'))
    assert (labels > 0).all() and torch.equal(out[..., :8], images[..., :8]) and (out[..., 8:] == 0.5).all()
    out, labels = augmented(images, p=0.5, cutout=1, cutout_grey=0.25, yflip=1)
    assert labels.shape == (64, 2) and 16 < (labels[:, 1] > 0).sum() < 48
    for image, label in zip(out, labels[:, 1]):
        assert (image[..., 8:] == 0.25).all() == (label > 0)
    assert {'cutout': 0, 'cutout_grey': 0.5}.items() <= AugmentPipe(**TRAIN_AUGMENT).init_kwargs.items()


def test_a_new_transform_is_trained_with(with_cutout, tmp_path):
    result = invoke('train.py', *SMALL, f'--outdir={tmp_path}', '--duration=0.000016', '--nosubdir', '--seed=0',
                    '--augment=0.5', '--augment-with=hue,cutout')
    assert result.exit_code == 0, (result.output, result.exception)
    options = json.loads((tmp_path / 'training_options.json').read_text())
    assert options['augment_kwargs'] == {'p': 0.5, 'cutout': 2, 'hue': 1}
    net = build_network(read_snapshot(tmp_path / 'network-snapshot-000000.safetensors'), SYSTEMS)
    assert net.model.map_augment.weight.shape[1] == 3


@pytest.mark.parametrize('flags, expected', [
    ([], {'p': 0.12, **TRAIN_AUGMENT}), (['--augment=0'], None),
    (['--augment-with= rotate_int, xflip'], {'p': 0.12, 'xflip': 1e8, 'rotate_int': 1}),
    (['--augment=1', f'--augment-with={",".join(NAMES)}'], {'p': 1, **all_on(), 'xflip': 1e8})])
def test_augment_with(flags, expected):
    """Without the flag the saved options are EDM's."""
    shown = invoke('train.py', '-n', *flags).output
    options, _ = json.JSONDecoder().raw_decode(shown[shown.index('{'):])
    assert options['augment_kwargs'] == expected
    assert expected is None or list(options['augment_kwargs']) == ['p', *(n for n in NAMES if n in expected)]


def test_augment_with_refuses():
    refused(invoke('train.py', '-n', '--augment-with=xflip,blur'), "no --augment-with 'blur'; choose one of xflip,",
            ', saturation')
    refused(invoke('train.py', '-n', '--augment=0', '--augment-with=xflip'), '--augment-with has no effect')
    refused(invoke('train.py', '-n', '--preset=digits', '--augment-with=xflip'), 'add --augment=PROB')


# -- execution

@pytest.mark.filterwarnings('ignore')  # torch's own, from inside its compiler
def test_no_value_is_read_back_by_the_host():
    """The whole call is captured as one graph, which reading a value, or a shape that depends on one, would break."""
    pipe = AugmentPipe(0.5, **all_on())
    torch.manual_seed(0)
    expected = pipe(some_images())
    torch.manual_seed(0)
    out = torch.compile(pipe.__call__, fullgraph=True, backend='eager')(some_images())
    assert torch.equal(out[0], expected[0]) and torch.equal(out[1], expected[1])


def test_shapes_alone_decide_what_is_computed():
    out, labels = AugmentPipe(**all_on())(some_images().to('meta'))
    assert out.shape == (4, 3, 16, 16) and labels.shape == (4, sum(t.columns for t in TRANSFORMS)) and out.is_meta


def test_only_the_global_generator_is_used():
    """Two calls in a row differ; the same seed repeats them."""
    a, b = augmented(some_images(), **all_on())[0], AugmentPipe(**all_on())(some_images())[0]
    assert not torch.equal(a, b) and torch.equal(a, augmented(some_images(), **all_on())[0])


# -- refusals

@pytest.mark.parametrize('settings, message', [
    (dict(p=1.5), 'p is 1.5'), (dict(p=-0.1), 'p is -0.1'), (dict(xflip=-1), 'xflip is -1'),
    (dict(scale=math.nan), 'scale is nan'), (dict(hue_max=math.inf), 'hue_max is inf'),
    (dict(translate_int_max=0), 'translate_int_max is 0'), (dict(cutout=1), "no augmentation setting 'cutout'; .*hue")])
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        AugmentPipe(**settings)


def test_images_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match='float images'):
        AugmentPipe(xflip=1)(torch.zeros([1, 3, 8, 8], dtype=torch.uint8))
    with pytest.raises(UserError, match='float images'):
        AugmentPipe(xflip=1)(torch.zeros([3, 8, 8]))
    with pytest.raises(UserError, match='square images only, not 8x4'):
        AugmentPipe(rotate_int=1)(torch.zeros([1, 3, 4, 8]))
    with pytest.raises(UserError, match='1 or 3 channels, not 2'):
        AugmentPipe(contrast=1)(torch.zeros([1, 2, 8, 8]))
    AugmentPipe(**TRAIN_AUGMENT)(torch.zeros([1, 2, 4, 8]))  # geometry takes any
