"""Blur in the DCT basis: the recorded values, real Gaussian blur, and the precision that small and strong blur need."""

import math

import numpy as np
import pytest
import scipy.fft
import scipy.ndimage
import torch

from dnnlib import UserError
from training.dataset import load_embedded
from training.pixels import to_float
from warm.blur import (blur, blur_and_rest, blur_mask, dct2, dct_matrix, filter_bands, frequencies, idct2,
                       log_mask_ratio, mask_difference, prior_spectrum, rest_magnitude, rest, rest_mask)

N = 16
ALPHAS = [0.0, 8e-5, 1e-3, 0.05, 0.7, 3.0, 40.0, 113.0]
TWO_FUNCTIONS = pytest.mark.parametrize('function', [blur, rest])


def images(count=4, n=N, dtype=torch.float64):
    return torch.randn([count, 3, n, n], generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


def close(actual, expected, rtol=0.0, atol=1e-12):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


# -- recorded values and independent calculations

def test_equals_record(golden):
    record = golden('warm-blur')
    x = torch.tensor(record.x)
    for i, alpha in enumerate(record.meta['alphas']):
        close(blur_mask(alpha, record.meta['N']), torch.tensor(record.mask[i]), atol=1e-9)
        close(blur(x, alpha), torch.tensor(record.blurred[i]), atol=1e-9)
        close(blur_and_rest(x, alpha)[1], x - torch.tensor(record.blurred[i]), atol=1e-9)


def test_dct_is_the_orthonormal_dct_ii():
    x = images()
    close(dct2(x), torch.tensor(scipy.fft.dctn(x.numpy(), axes=(2, 3), norm='ortho')))
    close(idct2(dct2(x)), x)
    close(dct_matrix(N) @ dct_matrix(N).T, torch.eye(N, dtype=torch.float64))


@pytest.mark.parametrize('alpha', [2.0, 3.5, 10.0])
def test_is_a_gaussian_of_that_many_pixels_with_reflecting_edges(alpha):
    """From 2 pixels on, a sampled Gaussian and a band-limited one differ by less than 1e-8."""
    x = images()
    expected = scipy.ndimage.gaussian_filter(x.numpy(), alpha, mode='reflect', truncate=8, axes=(2, 3))
    close(blur(x, alpha), torch.tensor(expected), atol=1e-7)


# -- laws

@pytest.mark.parametrize('a, b', [(0.5, 1.2), (3, 4), (0, 2)])
def test_two_blurs_make_one(a, b):
    close(blur(blur(images(), a), b), blur(images(), math.hypot(a, b)))


@pytest.mark.parametrize('alpha', ALPHAS)
def test_blur_and_rest_make_the_image(alpha):
    x = images()
    blurred, left = blur_and_rest(x, alpha)
    close(blurred + left, x)
    assert torch.equal(blurred, blur(x, alpha)) and torch.equal(left, rest(x, alpha))
    close(blurred.mean((2, 3)), x.mean((2, 3)))
    close(left.mean((2, 3)), torch.zeros([4, 3], dtype=torch.float64))


def test_no_blur_changes_nothing():
    x = images(dtype=torch.float32)
    assert torch.equal(blur(x, 0), x) and not rest(x, 0).any()


def test_blur_is_its_own_adjoint():
    x, y = images().split(2)
    close((blur(x, 1.3) * y).sum(), (x * blur(y, 1.3)).sum(), atol=1e-10)


@TWO_FUNCTIONS
def test_gradients(function):
    x = images(1, n=4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: function(x, torch.tensor([0.7])), (x,))


@TWO_FUNCTIONS
@pytest.mark.parametrize('shape', [[-1], [-1, 1, 1, 1]])
def test_one_blur_per_image(function, shape):
    x, alphas = images(8), torch.tensor(ALPHAS, dtype=torch.float64)
    batch = function(x, alphas.reshape(shape))
    close(batch, torch.cat([function(x[i:i + 1], alpha) for i, alpha in enumerate(ALPHAS)]), atol=1e-14)


def test_constants_made_in_inference_mode_serve_training():
    dct_matrix.cache_clear()
    frequencies.cache_clear()
    with torch.inference_mode():
        blur(images(), 0.5)
    x = images().requires_grad_()
    blur(x, 0.5).square().sum().backward()
    assert torch.isfinite(x.grad).all()


# -- precision

@TWO_FUNCTIONS
@pytest.mark.parametrize('dtype', [torch.float16, torch.float32, torch.float64])
def test_keeps_the_dtype(function, dtype):
    x = images(dtype=dtype)
    assert function(x, 0.5).dtype == dtype
    assert torch.equal(function(x, 0.5), function(x.double(), 0.5).to(dtype))


@TWO_FUNCTIONS
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(function, dtype):
    x = images(dtype=torch.float32)
    with torch.autocast('cpu', dtype=dtype):
        assert (x[0, 0] @ x[0, 0]).dtype == dtype, 'autocast is off, so this test shows nothing'
        inside = function(x, torch.tensor([0.01, 0.5, 2.0, 40.0]))
    assert inside.dtype == torch.float32
    assert torch.equal(inside, function(x, torch.tensor([0.01, 0.5, 2.0, 40.0])))


@TWO_FUNCTIONS
def test_reduced_matmul_precision_changes_nothing(function):
    x, before = images(dtype=torch.float32), torch.get_float32_matmul_precision()
    expected = function(x, 0.5)
    try:
        torch.set_float32_matmul_precision('medium')
        assert torch.equal(function(x, 0.5), expected)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='TF32 and float16 products need CUDA')
@TWO_FUNCTIONS
def test_tf32_and_autocast_on_cuda_change_nothing(function):
    x, before = images(dtype=torch.float32).cuda(), torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        with torch.autocast('cuda', dtype=torch.float16):
            fast = function(x, 0.01)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    torch.testing.assert_close(fast.cpu(), function(x.cpu(), 0.01), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize('alpha', [1e-3, 8e-5])
def test_rest_of_a_slight_blur_is_precise_in_float32(alpha):
    """The rest of a single band is 1 − exp(−λα²/2) ≈ λα²/2 of it; x − blurred is far off."""
    for k, l in ((0, 1), (3, 2), (15, 15)):
        bands = torch.zeros([1, 1, N, N], dtype=torch.float64)
        bands[..., k, l] = 1
        x = idct2(bands).to(torch.float32)
        heat = (k ** 2 + l ** 2) * (math.pi * alpha / N) ** 2 / 2
        # The input's own rounding also lies in higher bands, of which the blur removes more.
        expected = rest(x.double(), alpha)
        assert dct2(expected)[0, 0, k, l].item() == pytest.approx(heat * (1 - heat / 2), rel=1e-6)
        left = rest(x, alpha)
        assert left.dtype == torch.float32
        assert (left - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize('alpha, wrong', [(1e-3, 0.02), (8e-5, 0.5)])
def test_rest_is_not_a_difference_of_images(alpha, wrong):
    """Why `rest` has a mask of its own: on images like natural ones, x − blurred loses most digits or all."""
    x = filter_bands(images(), prior_spectrum(N).sqrt()).to(torch.float32)
    exact = rest(x.double(), alpha)
    assert (rest(x, alpha) - exact).norm() < 1e-6 * exact.norm()
    assert ((x - blur(x, alpha)) - exact).norm() > wrong * exact.norm()


def test_masks_keep_their_relative_precision():
    for alpha in (8e-5, 0.3, 40.0):
        heat = frequencies(N) * alpha ** 2 / 2
        torch.testing.assert_close(rest_mask(alpha, N), -torch.expm1(-heat), rtol=1e-14, atol=0)
        torch.testing.assert_close(blur_mask(alpha, N), torch.exp(-heat), rtol=1e-14, atol=0)


@pytest.mark.parametrize('here, there', [(0.5, 0.2), (0.2, 0.5), (1e-3, 9e-4), (40, 30), (113, 80), (2, 0), (0, 0)])
def test_ratio_and_difference_of_masks(here, there):
    ratio, difference = log_mask_ratio(here, there, N), mask_difference(here, there, N)
    close(ratio, frequencies(N) * (here ** 2 - there ** 2) / 2, atol=1e-9)
    close(difference, blur_mask(there, N) - blur_mask(here, N), atol=1e-15)
    assert torch.isfinite(ratio).all() and torch.isfinite(difference).all()


def test_difference_of_near_masks_does_not_cancel():
    here, there = 1e-3, 1e-3 * (1 - 1e-6)
    slope = frequencies(N) * here * (here - there)  # −dM/dα·Δα, M ≈ 1
    torch.testing.assert_close(mask_difference(here, there, N), slope, rtol=1e-5, atol=0)


def test_one_pair_of_blurs_per_image():
    here, there = torch.tensor([0.5, 2.0]), torch.tensor([0.2, 3.0])
    difference = mask_difference(here, there, N)
    assert difference.shape == (2, 1, N, N)
    close(difference[1, 0], mask_difference(2.0, 3.0, N))


# -- the prior spectrum and the scale of the rest

def test_prior_spectrum():
    S = prior_spectrum(32)
    assert S.mean().item() == pytest.approx(0.25) and (S[0, 0] / S[3, 4]).item() == pytest.approx(26 ** 1.2)


@pytest.mark.parametrize('alpha, scale', [(0.01, 5e-5), (0.05, 0.0012), (0.15, 0.010), (0.5, 0.077), (5, 0.31),
                                          (40, 0.44)])
def test_scale_of_the_rest_has_the_values_of_the_spec(alpha, scale):
    assert rest_magnitude(alpha, 32).item() == pytest.approx(scale, rel=0.05)


def test_scale_of_the_rest_is_that_of_images_with_the_prior_spectrum():
    white = torch.randn([2000, 1, N, N], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = filter_bands(white, prior_spectrum(N).sqrt())
    for alpha in (0.1, 1.0, 10.0):
        assert rest(x, alpha).square().mean().sqrt().item() == pytest.approx(rest_magnitude(alpha, N).item(), rel=0.03)


def test_scale_of_the_rest_per_image():
    scale = rest_magnitude(torch.tensor([0.0, 0.5]).reshape(-1, 1, 1, 1), N)
    assert scale.shape == (2, 1, 1, 1) and scale[0] == 0 and scale[1].item() == rest_magnitude(0.5, N).item()


def test_pixel_values_are_refused():
    """Blurred as they are, they would be cut off to whole numbers, and wrap around."""
    for pixels in (torch.full([1, 3, 8, 8], 255, dtype=torch.uint8), torch.zeros([1, 3, 8, 8], dtype=torch.int64)):
        for work in (blur, rest):
            with pytest.raises(UserError, match=r'are pixel values; scale them to \[−1, 1\]'):
                work(pixels, 0.5)


@pytest.mark.parametrize('alpha', [-1, math.nan, math.inf, [0.5, -0.5]])
def test_no_blur_is_negative(alpha):
    for work in (blur, rest, blur_and_rest):
        with pytest.raises(UserError, match='is not a valid blur in pixels; give numbers ≥ 0'):
            work(images(), alpha)


def test_images_that_are_not_square_are_refused():
    with pytest.raises(UserError, match='16×8 pixels.*crop'):
        blur(torch.zeros([1, 3, 8, 16]), 0.5)


def test_scale_of_the_rest_of_one_blur_is_a_number():
    assert rest_magnitude(0.5, N).shape == ()


def test_numbers_on_the_page_of_the_method():
    """docs/method.md: what x₀ − blurred loses in float32, how far s_R reaches, how many bands strong blur takes."""
    digits = load_embedded()
    x = to_float(torch.from_numpy(np.stack([digits[i][0] for i in range(100)])))
    exact = rest(x.double(), 0.001)
    assert (x - blur(x, 0.001) - exact).norm() > 0.01 * exact.norm() > 1000 * (rest(x, 0.001) - exact).norm()
    assert 5.5 < math.log10(rest_magnitude(40, 32) / rest_magnitude(0.001, 32)) < 6.5
    assert 0.85 < (blur_mask(40, 32) == 0).double().mean() < 0.95
