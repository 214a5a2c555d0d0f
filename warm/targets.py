"""What the branches of the network learn: the parametrisations (a)–(d) of the paper's Table 5.

Each turns the network's outputs F into estimates, defines their training targets, and gives the sampler
its D and R. To add one: a subclass of `Parametrisation` here and a line in TARGETS. It has to define `names`,
`targets` and `parts`, and `estimates` unless all its branches use EDM's c_skip and c_out.

The loss weights the squared error of every branch by EDM's λ(β) (but see --rest-loss), which is meant for errors in
image units: a branch that estimates the noise as βε, so that D = x − β ε̂, has the same error as D, and λ(β) means the
same for it. One that estimates ε itself would weight D's squared error by λ(β)/β².
"""

import dataclasses
from collections.abc import Callable

import torch

from warm.blur import blur_and_rest, blur_mask, filter_bands, frequencies, rest
from warm.choices import REST, REST_SCALES

MIN_MASK = 1e-3  # (b) divides by M: below this a band counts as lost (ours: x₀ = V max(M, 10⁻³)⁻¹ Vᵀ D)


@dataclasses.dataclass(frozen=True, eq=False)
class Point:
    """Where a network is evaluated. All tensors but x are [B or 1, 1, 1, 1].

    Attributes:
        x: Blurred and noisy images [B, C, N, N], float32, x = V M_α Vᵀ x₀ + β ε.
        beta: Noise level β > 0, float32.
        alpha: Blur in pixels ≥ 0, float32 or float64.
        c_skip, c_out, c_in, c_noise: EDM's coefficients at σ = β, float32.
        sigma_data: Standard deviation of the data.
        rest_scale: Scale of R, a name in warm.choices.REST_SCALES.
        rates: The blur's, one of warm.blur.BLUR_RATES.
    """

    x: torch.Tensor
    beta: torch.Tensor
    alpha: torch.Tensor
    c_skip: torch.Tensor
    c_out: torch.Tensor
    c_in: torch.Tensor
    c_noise: torch.Tensor
    sigma_data: float
    rest_scale: str
    rates: Callable = frequencies


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """What a network is trained on: x = blurred + β·noise. Images are [B, C, N, N], β and α [B, 1, 1, 1].

    Attributes:
        images: x₀, after augmentation.
        blurred, rest: V M Vᵀ x₀ (Eq. 5) and V (I − M) Vᵀ x₀ (Eq. 6); at BNR 0, x₀ and None.
        noise: ε, standard normal.
        beta, alpha: Noise level, and blur in pixels.
        sigma_data, rates: As in `Point`.
    """

    images: torch.Tensor
    blurred: torch.Tensor
    rest: torch.Tensor | None
    noise: torch.Tensor
    beta: torch.Tensor
    alpha: torch.Tensor
    sigma_data: float
    rates: Callable = frequencies


class Parametrisation:
    """A row of Table 5.

    Attributes:
        names: One name per branch, all different, as in `Loss/denoise`. REST is the branch that estimates the rest, to
            which --rest-weight, --rest-scale and --rest-loss apply.
    """

    names = ()

    def estimates(self, F, point):
        """c_skip·x + c_out·F for each branch, right for estimates of the clean or the blurred image.

        Ours, as for D in Table 5 (d); the paper only says that EDM's choices are kept.

        Args:
            F: Outputs of the network, of unit scale: one per branch, like x.
            point: Where it was evaluated.
        """
        skip = point.c_skip * point.x
        return tuple(skip + point.c_out * F_i for F_i in F)

    def targets(self, example):
        """The training targets of the estimates: one per branch, like x."""
        raise NotImplementedError

    def parts(self, estimates, point):
        """(D, R) for the sampler, like x; R has zero mean."""
        raise NotImplementedError


class Residual(Parametrisation):
    """(d), the paper's choice: D estimates the blurred image, R the rest."""

    names = ('denoise', REST)

    def estimates(self, F, point):
        """D = c_skip·x + c_out·F_D, and `rest_estimate`."""
        F_D, F_R = F
        return point.c_skip * point.x + point.c_out * F_D, rest_estimate(F_R, point)

    def targets(self, example):
        """V M Vᵀ x₀ (Eq. 5) and V (I − M) Vᵀ x₀ (Eq. 6)."""
        return example.blurred, example.rest

    def parts(self, estimates, point):
        """(D, R)."""
        return estimates


def rest_estimate(F_R, point):
    """R = skip + s_R·F_R minus its mean per channel; both by REST_SCALES[rest_scale].

    Blur preserves the mean, so the rest has zero mean; any other would enter x̂₀ = D + R, which dpmpp2m and the
    network's `forward` use.
    """
    kind = REST_SCALES[point.rest_scale]
    R = kind.skip(point) + kind.scale(point).to(F_R.dtype) * F_R
    return R - R.mean(dim=(2, 3), keepdim=True)


class CleanOnly(Parametrisation):
    """(a): one branch estimates x₀; D and R are its blurred part and the rest."""

    names = ('clean',)

    def targets(self, example):
        """x₀."""
        return (example.images,)

    def parts(self, estimates, point):
        """(V M Vᵀ x̂₀, V (I − M) Vᵀ x̂₀)."""
        clean, = estimates
        blurred, gone = blur_and_rest(clean, point.alpha, point.rates)
        return torch.where(point.alpha > 0, blurred, clean), gone  # without blur to the last bit, which a DCT rounds


class BlurredOnly(Parametrisation):
    """(b): one branch estimates the blurred image; x̂₀ = V max(M, 10⁻³)⁻¹ Vᵀ D.

    D + R differs from this x̂₀ in the bands where M < 10⁻³, by a thousandth of it at most.
    """

    names = ('denoise',)

    def targets(self, example):
        """V M Vᵀ x₀."""
        return (example.blurred,)

    def parts(self, estimates, point):
        """(D, V (I − M) Vᵀ x̂₀)."""
        D, = estimates
        clean = filter_bands(D, 1 / blur_mask(point.alpha, D.shape[-1], point.rates).clamp(min=MIN_MASK))
        return D, rest(clean, point.alpha, point.rates)


class CleanAndBlurred(Parametrisation):
    """(c): two branches estimate the blurred image and x₀."""

    names = ('denoise', 'clean')

    def targets(self, example):
        """V M Vᵀ x₀ and x₀."""
        return example.blurred, example.images

    def parts(self, estimates, point):
        """(D, V (I − M) Vᵀ x̂₀)."""
        D, clean = estimates
        return D, rest(clean, point.alpha, point.rates)


class Hot(Parametrisation):
    """BNR 0: EDM. One branch, D = x̂₀; there is no rest. Not a choice of --targets: the path implies it."""

    names = ('denoise',)

    def targets(self, example):
        """x₀."""
        return (example.images,)

    def parts(self, estimates, point):
        """(D, 0)."""
        D, = estimates
        return D, torch.zeros_like(D)


TARGETS = {'residual': Residual(), 'clean': CleanOnly(), 'blurred': BlurredOnly(), 'clean-blurred': CleanAndBlurred()}
PAPER_TARGETS = 'residual'  # the paper's choice, (d) of Table 5, and the default everywhere
