"""Choosing the Blur-to-Noise Ratio from the spectrum of the data (Sec. 2.4).

The paper uses 0.5, up to which the observation stays comparable to hot diffusion's. The rule that turns this into a
number is ours: the largest BNR at which the observed spectrum M²S + β² stays within 0.5 dB of hot diffusion's S + β²,
over all bands and noise levels. On CIFAR-10 that is 0.51. S is measured per DCT band [k, l]. Averaged over rings
k² + l² ≈ r², the gap would be about half as large, since the power within a ring is uneven: the bands with k = 0 or
l = 0 hold most of it, and they decide. For the same reason the fitted power law is only printed: it would allow
CIFAR-10 a BNR of 0.86.

warm.spectrum is the command that measures a data set and draws the figures.
"""

import concurrent.futures
import math

import numpy as np
import torch

from dnnlib import UserError
from training.pixels import to_float
from training.schedules import SIGMA_MAX, SIGMA_MIN
from warm.blur import dct2, frequencies

TOLERANCE = 0.5  # dB; gives the paper's BNR on CIFAR-10
SEARCHED_UP_TO = 100  # beyond it there is nothing left to blur
MIN_RESOLUTION = 4  # below it a spectrum has no shape
WORKERS = 2
BATCH_ELEMENTS = 1 << 21  # pixel values in memory per worker: 16 MB as float64
BETAS = torch.logspace(math.log10(SIGMA_MIN), math.log10(SIGMA_MAX), 400,
                       dtype=torch.float64)  # a finer grid changes a gap by less than 0.001 dB


# -- measuring

def band_power(dataset, max_images=None, seed=0):
    """Mean power of each DCT band over images and channels, in one pass.

    Args:
        dataset: training.dataset.ImageFolderDataset, whose items are (uint8 [C, N, N], label).
        max_images: Take a random subset of this many, chosen by `seed`; None takes all.

    Returns:
        float64 [N, N]: mean of (Vᵀx)², x in [−1, 1]; its mean over the bands is the mean square of a pixel.

    Raises:
        UserError: images smaller than 4×4, damaged images, an empty subset.
    """
    n = dataset.resolution
    if n < MIN_RESOLUTION:
        raise UserError(f'images of {n}x{n} pixels are too small for a spectrum; '
                        f'give at least {MIN_RESOLUTION}x{MIN_RESOLUTION}')
    if max_images is not None and max_images < 1:
        raise UserError(f'--max-images={max_images} is too few to measure a spectrum; give at least 1')
    indices = np.arange(len(dataset))
    if max_images is not None and max_images < len(dataset):
        indices = np.sort(np.random.default_rng(seed).choice(len(dataset), max_images, replace=False))
    size = max(1, BATCH_ELEMENTS // math.prod(dataset.image_shape))
    batches = [indices[start:start + size] for start in range(0, len(indices), size)]

    def power(batch):
        images = torch.from_numpy(np.stack([dataset[i][0] for i in batch]))
        return dct2(to_float(images)).square().sum((0, 1))

    # Decoding in one thread overlaps with another's transforms. The batches are summed in order.
    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        return sum(pool.map(power, batches)) / (len(indices) * dataset.num_channels)


# -- the rule

def spectral_gap(power, bnr, rates=frequencies):
    """Largest distance in dB between M²S + β² and hot diffusion's S + β², over all bands and β in BETAS.

    Args:
        power: S, float64 [N, N], as from `band_power`.
        bnr: Blur-to-Noise Ratio α/β ≥ 0.
        rates: The blur's, one of warm.blur.BLUR_RATES.
    """
    S, rate = undominated(power, rates)
    beta = BETAS[:, None]
    noise, squared_mask = beta.square(), torch.exp(-rate * (bnr * beta).square())
    ratio = (S + noise) / (squared_mask * S + noise)
    return 10 * ratio.log10().max().item()


def undominated(power, rates=frequencies):
    """(S [K], λ [K]) of the bands that no other band exceeds in both, float64.

    A band that another exceeds in both never has the largest gap, since the gap grows with S and, as M² = exp(−λα²),
    with λ.
    """
    rate = rates(len(power)).flatten()
    order = torch.argsort(rate, descending=True, stable=True)
    S, rate = power.to(torch.float64).flatten()[order], rate[order]
    kept = S.cummax(0).indices == torch.arange(len(S))
    return S[kept], rate[kept]


def recommended_bnr(power, tolerance=TOLERANCE, rates=frequencies):
    """The largest BNR, to two decimals, whose `spectral_gap` is at most `tolerance` dB; 0 if even 0.01 is too much.

    Raises:
        UserError: tolerance not above 0, or so large (or images with so little detail) that every BNR would do.
    """
    if not (tolerance > 0 and math.isfinite(tolerance)):
        raise UserError(f'a tolerance of {tolerance} dB allows no blur at all; give a number above 0, '
                        f'such as {TOLERANCE}')
    low, high = 0, SEARCHED_UP_TO * 100  # the gap grows with the BNR
    if spectral_gap(power, SEARCHED_UP_TO, rates) <= tolerance:
        raise UserError(f'every BNR up to {SEARCHED_UP_TO} stays within {tolerance:g} dB on these images; '
                        'give a smaller --tolerance, or images with more detail')
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if spectral_gap(power, middle / 100, rates) <= tolerance else (low, middle)
    return low / 100


def fit_power_law(power):
    """(c, γ) of S ≈ c·(k² + l² + 1)^−γ, the form of warm.blur.prior_spectrum; at high frequencies that is 1/f^2γ.

    A least-squares fit of ln S over all bands with power except the mean, with equal weight for each octave.
    """
    r2 = radius(len(power)).square()
    used = (r2 > 0) & (power > 0)
    if len(r2[used].unique()) < 2:
        raise UserError('the images have no detail, so their spectrum has no power law; give other images')
    root_weight = 1 / r2[used].sqrt()
    unknowns = torch.stack([torch.ones_like(r2[used]), -(r2[used] + 1).log()], 1) * root_weight[:, None]
    log_c, gamma = torch.linalg.lstsq(unknowns, (power[used].log() * root_weight)[:, None]).solution[:, 0].tolist()
    return math.exp(log_c), gamma


def radius(n):
    """√(k² + l²) [n, n], float64."""
    k = torch.arange(n, dtype=torch.float64).square()
    return (k[:, None] + k).sqrt()
