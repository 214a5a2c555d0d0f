"""What the branches of the network learn: the parametrisations (a)–(d) of the paper's Table 5.

Each turns the outputs F of the network into estimates, names what those estimates are trained to be, and
gives the sampler its D and R. To add one: a class here and a line in TARGETS.

F has unit scale. A branch that estimates the clean or the blurred image uses EDM's c_skip and c_out
(ours; the paper only says that EDM's choices are kept), as Table 5 (d)'s D does.
"""

import torch

from warm.blur import blur_and_rest, blur_mask, filter_bands
from warm.blur import rest as rest_of
from warm.choices import REST, REST_SCALES

MIN_MASK = 1e-3  # (b) divides by M: below this the band is taken as lost (ours: x₀ = V max(M, 10⁻³)⁻¹ Vᵀ D)


class Residual:
    """(d), the paper's choice: D estimates the blurred image, R the rest."""

    names = ('denoise', REST)

    @staticmethod
    def estimates(F, skip, c_out, alpha, sigma_data, rest_scale):
        """D = c_skip·x + c_out·F_D, R = s_R·F_R without its mean per channel; s_R is REST_SCALES[rest_scale].

        At λ = 0 there is nothing to restore, and Heun's corrector would amplify a stray mean.
        """
        F_D, F_R = F
        s_R = REST_SCALES[rest_scale](alpha, c_out, F_R.shape[-1], sigma_data)
        R = s_R.to(F_R.dtype) * F_R
        return skip + c_out * F_D, R - R.mean(dim=(2, 3), keepdim=True)

    @staticmethod
    def targets(images, blurred, rest):
        """V M Vᵀ x₀ (Eq. 5) and V (I − M) Vᵀ x₀ (Eq. 6)."""
        return blurred, rest

    @staticmethod
    def parts(estimates, alpha):
        """(D, R)."""
        return estimates


class CleanOnly:
    """(a): one branch estimates x₀; D and R are its blurred part and the rest."""

    names = ('clean',)

    @staticmethod
    def estimates(F, skip, c_out, alpha, sigma_data, rest_scale):
        """x̂₀ = c_skip·x + c_out·F."""
        return (skip + c_out * F[0],)

    @staticmethod
    def targets(images, blurred, rest):
        """x₀."""
        return (images,)

    @staticmethod
    def parts(estimates, alpha):
        """(V M Vᵀ x̂₀, V (I − M) Vᵀ x̂₀)."""
        return blur_and_rest(estimates[0], alpha)


class BlurredOnly:
    """(b): one branch estimates the blurred image; x̂₀ = V max(M, 10⁻³)⁻¹ Vᵀ D."""

    names = ('denoise',)
    estimates = staticmethod(CleanOnly.estimates)

    @staticmethod
    def targets(images, blurred, rest):
        """V M Vᵀ x₀."""
        return (blurred,)

    @staticmethod
    def parts(estimates, alpha):
        """(D, V (I − M) Vᵀ x̂₀)."""
        D, = estimates
        clean = filter_bands(D, 1 / blur_mask(alpha, D.shape[-1]).clamp(min=MIN_MASK))
        return D, rest_of(clean, alpha)


class CleanAndBlurred:
    """(c): two branches estimate the blurred image and x₀."""

    names = ('denoise', 'clean')

    @staticmethod
    def estimates(F, skip, c_out, alpha, sigma_data, rest_scale):
        """D and x̂₀, both c_skip·x + c_out·F."""
        return skip + c_out * F[0], skip + c_out * F[1]

    @staticmethod
    def targets(images, blurred, rest):
        """V M Vᵀ x₀ and x₀."""
        return blurred, images

    @staticmethod
    def parts(estimates, alpha):
        """(D, V (I − M) Vᵀ x̂₀)."""
        D, clean = estimates
        return D, rest_of(clean, alpha)


class Hot:
    """BNR 0: EDM. One branch, D = x̂₀; there is no rest. Not a choice of --targets: the path implies it."""

    names = ('denoise',)
    estimates = staticmethod(CleanOnly.estimates)
    targets = staticmethod(CleanOnly.targets)

    @staticmethod
    def parts(estimates, alpha):
        """(D, 0)."""
        return estimates[0], torch.zeros_like(estimates[0])


TARGETS = {'residual': Residual, 'clean': CleanOnly, 'blurred': BlurredOnly, 'clean-blurred': CleanAndBlurred}
