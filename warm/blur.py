"""Gaussian blur in the DCT basis: V M_α Vᵀ x₀ and the rest V (I − M_α) Vᵀ x₀ (Warm Diffusion, Eq. 1 and 6).

Vᵀ is the orthonormal two-dimensional DCT-II of each channel of an N×N image, V its inverse. M_α is
diagonal: M = exp(−λ α²/2) with λ[k,l] = (πk/N)² + (πl/N)², a Gaussian blur of standard deviation α
pixels with reflecting edges.

Another blur has other rates λ, at which the bands fade. To add one: a function like `natural_rates`, here or in a file
of its own, and one line in BLUR_RATES; whatever depends on the blur takes that function as `rates`. Rates are ≥ 0, and
0 for the mean, λ[0,0], which no blur changes.

Everything here is computed in float64; `blur`, `rest` and `filter_bands` return their input's dtype. TF32 and autocast
affect only float32 products, so no global switch is needed against them; at these sizes the cost is
far below that of a network (tests/benchmarks/bench_warm.py).
"""

import math

import torch

from dnnlib import UserError
from dnnlib.text import excerpt
from torch_utils.constants import constant
from training.pixels import SIGMA_DATA, check_floats


@constant
def dct_matrix(n, device=torch.device('cpu')):
    """Orthonormal DCT-II matrix [n, n], float64: row k holds √(2/n)·cos(πk(i+½)/n), row 0 is √(1/n)."""
    k, i = (torch.arange(n, dtype=torch.float64) for _ in range(2))
    matrix = torch.cos(math.pi / n * k[:, None] * (i + 0.5)) * math.sqrt(2 / n)
    matrix[0] = math.sqrt(1 / n)
    return matrix.to(device)


@constant
def frequencies(n, device=torch.device('cpu')):
    """λ[k,l] = (πk/n)² + (πl/n)² [n, n], float64, per squared pixel: the eigenvalues of −Δ (negative Laplacian)."""
    f = (torch.arange(n, dtype=torch.float64) * (math.pi / n)).square()
    return (f[:, None] + f).to(device)


@constant
def prior_spectrum(n, sigma_data=SIGMA_DATA, device=torch.device('cpu')):
    """Natural-image prior S ∝ (k² + l² + 1)^−1.2 with mean σ_data² over the bands: [n, n], float64 (ours)."""
    k = torch.arange(n, dtype=torch.float64).square()
    s = (k[:, None] + k + 1) ** -1.2
    return (s * (sigma_data ** 2 / s.mean())).to(device)


@constant
def natural_rates(n, device=torch.device('cpu')):
    """λ ∝ 1/S − 1/S[0,0] [n, n], S from `prior_spectrum`; the highest band has the Gaussian's rate (ours).

    But for the subtraction, which matters in the lowest bands, λα² is proportional to β²/S at constant BNR. M then
    depends on a band's signal-to-noise ratio alone: all bands fade at the same ratio, whereas with the Gaussian, low
    bands fade while theirs is still high.
    """
    rates = 1 / prior_spectrum(n)
    rates = rates - rates[0, 0]
    return (rates * (frequencies(n)[-1, -1] / rates[-1, -1])).to(device)


BLUR_RATES = {'gaussian': frequencies, 'natural': natural_rates}
PAPER_BLUR = 'gaussian'


def dct2(x):
    """Vᵀx: orthonormal DCT-II over the last two dimensions of x [..., N, N]; returns float64 bands.

    Raises:
        UserError: images that are not square, or not floats.
    """
    check_floats(x)
    if x.shape[-1] != x.shape[-2]:
        raise UserError(f'blur is defined for square images here, not for {x.shape[-1]}×{x.shape[-2]} pixels; '
                        'crop them first')
    matrix = dct_matrix(x.shape[-1], x.device)
    return matrix @ x.to(torch.float64) @ matrix.T


def idct2(bands):
    """Vy: inverse of `dct2`, float64."""
    matrix = dct_matrix(bands.shape[-1], bands.device)
    return matrix.T @ bands.to(torch.float64) @ matrix


def filter_bands(x, gain):
    """V (gain ∘ Vᵀx): images x [B, C, N, N] with their bands scaled by gain [..., N, N]; x's dtype."""
    return idct2(gain * dct2(x)).to(x.dtype)


def _half_square(alpha):
    """α²/2 (the heat time, in squared pixels) as float64, with axes for the bands: [] or [B, 1, 1, 1]."""
    alpha = torch.as_tensor(alpha, dtype=torch.float64)
    return (alpha if alpha.ndim == 0 else alpha.reshape(-1, 1, 1, 1)).square() / 2


def log_blur_mask(alpha, n, rates=frequencies):
    """ln M_α = −λ α²/2, finite at any blur; arguments and shape as in `blur_mask`."""
    tau = _half_square(alpha)
    return -rates(n, tau.device) * tau


def blur_mask(alpha, n, rates=frequencies):
    """M_α = exp(−λ α²/2).

    Args:
        alpha: Blur in pixels, ≥ 0: a number or 0-d tensor, or one per image ([B] or [B, 1, 1, 1]).
        n: Image width N.
        rates: λ(n, device), one of BLUR_RATES.

    Returns:
        float64 in [0, 1], 0 where it underflows: [n, n], or [B, 1, n, n] for one blur per image.
    """
    return log_blur_mask(alpha, n, rates).exp()


def rest_mask(alpha, n, rates=frequencies):
    """1 − M_α, shaped like `blur_mask`; uses expm1 to keep its relative precision at blur near 0."""
    return -torch.expm1(log_blur_mask(alpha, n, rates))


def log_mask_ratio(alpha, alpha_next, n, rates=frequencies):
    """ln(M′/M) = λ(α² − α′²)/2, shaped like `blur_mask`; not from the masks, which are nearly all 0 at strong blur."""
    tau, tau_next = _half_square(alpha), _half_square(alpha_next)
    return rates(n, tau.device) * (tau - tau_next.to(tau.device))


def mask_difference(alpha, alpha_next, n, rates=frequencies):
    """M′ − M, shaped like `blur_mask`: ±max(M, M′)·(1 − exp(−|ln M′/M|)), which neither cancels nor overflows."""
    log_ratio = log_mask_ratio(alpha, alpha_next, n, rates)
    larger = torch.maximum(blur_mask(alpha, n, rates), blur_mask(alpha_next, n, rates))
    return -log_ratio.sign() * larger * torch.expm1(-log_ratio.abs())


def blur(x, alpha, rates=frequencies):
    """V M_α Vᵀ x: images x [B, C, N, N] blurred by α pixels (as in `blur_mask`); x's dtype."""
    return filter_bands(x, blur_mask(_on(alpha, x), x.shape[-1], rates))


def rest(x, alpha, rates=frequencies):
    """V (I − M_α) Vᵀ x: what `blur` removes, without the cancellation of x − blur(x, α); x's dtype."""
    return filter_bands(x, rest_mask(_on(alpha, x), x.shape[-1], rates))


def blur_and_rest(x, alpha, rates=frequencies):
    """(blur(x, α), rest(x, α)) from one forward transform."""
    bands, alpha = dct2(x), _on(alpha, x)
    return tuple(idct2(mask(alpha, x.shape[-1], rates) * bands).to(x.dtype) for mask in (blur_mask, rest_mask))


def _on(alpha, x):
    check_alpha(alpha)
    return torch.as_tensor(alpha, dtype=torch.float64, device=x.device)


def check_alpha(alpha):
    """Raise UserError for a negative or non-finite blur; not for a tensor's, as the host would wait for its values."""
    if isinstance(alpha, torch.Tensor):
        return
    given = torch.as_tensor(alpha, dtype=torch.float64)
    if not (given.isfinite() & (given >= 0)).all():
        raise UserError(f'{excerpt(given.flatten().tolist(), 100)} is not a valid blur in pixels; give numbers ≥ 0')


def rest_magnitude(alpha, n, sigma_data=SIGMA_DATA, rates=frequencies):
    """s_R(α) = √mean((1−M)² S): expected magnitude of the rest under the prior spectrum (ours).

    Args:
        alpha: Blur in pixels, [B, 1, 1, 1] or a number.
        n: Image width N.
        sigma_data: Standard deviation of the data.
        rates: As in `blur_mask`.

    Returns:
        float64, [B, 1, 1, 1] or a 0-d tensor; 0 at α = 0.
    """
    gone = rest_mask(alpha, n, rates)
    power = gone.square() * prior_spectrum(n, sigma_data, gone.device)
    return power.mean(dim=(-2, -1), keepdim=power.ndim > 2).sqrt()


def marginal_variance(M, beta, spectrum):
    """M²S + β²: power of the observation in each band, for a mask M, a noise level that broadcasts to it, and S."""
    return M.square() * spectrum + beta ** 2


def wiener_filter(alpha, beta, spectrum, rates=frequencies):
    """The best linear filter for images of a given spectrum, and the power of its error.

    Args:
        alpha: Blur in pixels, [B, 1, 1, 1] or a number.
        beta: Noise level β > 0, a number or one per image.
        spectrum: S, float64 [n, n]: mean power of the images in each band.
        rates: As in `blur_mask`.

    Returns:
        (M S/(M²S + β²), S β²/(M²S + β²)), float64 [B or 1, 1, n, n]: V of the first times Vᵀx is the estimate of x₀
        (its expectation, for Gaussian data), the second is the power of its error in each band.
    """
    M = blur_mask(alpha, len(spectrum), rates)
    beta = torch.as_tensor(beta, dtype=torch.float64, device=spectrum.device).reshape(-1, 1, 1, 1)
    observed = marginal_variance(M, beta, spectrum)
    return M * spectrum / observed, spectrum * beta.square() / observed
