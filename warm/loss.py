"""Warm's training loss: Eq. 5 and 6 with EDM's weight and distribution of noise levels."""

import dataclasses

import torch

from torch_utils import training_stats
from torch_utils.distributed import unwrapped
from training.loss import P_MEAN, P_STD, augment, edm_loss_weight, sample_edm_sigma
from training.precond import SIGMA_DATA
from warm.blur import blur_and_rest
from warm.choices import DEFAULTS, REST, REST_LOSSES
from warm.targets import Example


@dataclasses.dataclass
class WarmLoss:
    """λ(β)·Σ over the branches of (estimate − target)², by default ‖D − V M Vᵀ x₀‖² + ‖R − V (I−M) Vᵀ x₀‖².

    Both terms have the same λ (ours, for the reason given in warm.choices), unless `rest_loss` gives R's another;
    `rest_weight` multiplies R's term. Random numbers are drawn in this order: β's variate [B, 1, 1, 1], the BNR's
    [B, 1, 1, 1] if the network is trained on several, the augmentation, the noise. The blur comes after the
    augmentation. Each branch's term is also reported separately as `Loss/NAME`, by default `Loss/denoise` and
    `Loss/deblur`, weighted by λ alone, so that runs with different weights can be compared.

    Args:
        P_mean, P_std: EDM's distribution of ln β.
        sigma_data: Standard deviation of the data.
        rest_weight, rest_loss: Weights of R's term, if a branch estimates the rest (warm.choices).
    """

    P_mean: float = P_MEAN
    P_std: float = P_STD
    sigma_data: float = SIGMA_DATA
    rest_weight: float = DEFAULTS['rest_weight']
    rest_loss: str = DEFAULTS['rest_loss']

    def __call__(self, net, images, labels=None, augment_pipe=None):
        """Loss of each element, float32 like `images` [B, C, N, N] in [−1, 1]; `net` may be wrapped in DDP."""
        bare = unwrapped(net)
        sigma = sample_edm_sigma(images.shape[0], images.device, self.P_mean, self.P_std)
        alpha = bare.family.draw_alpha(sigma)
        y, augment_labels = augment(images, augment_pipe)
        noise = torch.randn_like(y)
        blurred, rest = (y, None) if bare.family.is_hot else blur_and_rest(y, alpha, bare.rates)
        x = blurred + noise * sigma
        estimates = net(x, sigma, labels, alpha=alpha, return_estimates=True, augment_labels=augment_labels)
        weight = edm_loss_weight(sigma, self.sigma_data)
        example = Example(y, blurred, rest, noise, sigma, alpha, self.sigma_data, bare.rates)
        targets = bare.parametrisation.targets(example)
        terms = []
        for name, estimate, target in zip(bare.parametrisation.names, estimates, targets, strict=True):
            square = (estimate - target) ** 2
            term = weight * square
            training_stats.report(f'Loss/{name}', term)
            if name == REST:
                own_weight = REST_LOSSES[self.rest_loss]
                if own_weight is not None:
                    term = own_weight(weight, bare.point(x, sigma, alpha)) * square
                term = self.rest_weight * term
            terms.append(term)
        return sum(terms[1:], start=terms[0])
