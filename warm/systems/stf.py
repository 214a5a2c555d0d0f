"""Stable Target Field (Xu, Tong and Jaakkola, ICLR 2023): EDM with a regression target of lower variance.

EDM's target x₀ is one draw from p(x₀|x_t); STF regresses on its mean over a reference batch,

    Σ_j w_j y_j,    w_j ∝ exp(−|x_t − y_j|²/2σ²),

where the y_j include the image itself; computed in the log domain. Network, noise levels, weight and samplers are
EDM's.

What is ours:
- The reference batch is the batch of one forward pass (--batch-gpu), not a larger one drawn separately (theirs for
  CIFAR-10 is several thousand images): there is no state to keep, and a batch of one is EDM exactly.
- With conditioning (classes, augmentation) only images with the same labels count, since the network estimates
  E[x₀|x_t, labels]; an augmented image, whose labels are unique to it, keeps its own x₀ as target.
"""

import dataclasses

import torch

from training.loss import P_MEAN, P_STD, augment, edm_loss_weight, sample_edm_sigma
from training.precond import SIGMA_DATA, EDMPrecond
from training.system import ABLATION_OPTIONS, COMMON_SAMPLE_OPTIONS, System, loss_for, make_edm_sampler


def posterior_mean(x, sigma, images, labels=None):
    """E[x₀|x] for x = x₀ + σε and x₀ uniform over the `images` with the same labels: float32 like x.

    Args:
        x: Noisy images [B, C, H, W]; x[i] is images[i] with noise.
        sigma: Noise levels [B, 1, 1, 1].
        images: Reference batch; its first B images are those of x.
        labels: [len(images), L], or None.
    """
    # Expanding the squares is safe in float64: |x|² is at most 1e7, far below the reciprocal of its rounding error.
    flat_x, flat_y = (v.flatten(1).to(torch.float64) for v in (x, images))
    squares = flat_x.square().sum(1, keepdim=True) - 2 * flat_x @ flat_y.T + flat_y.square().sum(1)
    log_weights = -squares / (2 * sigma.flatten(1).to(torch.float64).square())
    if labels is not None:
        matches = (labels[:len(x), None] == labels).all(dim=2)
        log_weights = log_weights.masked_fill(~matches, -torch.inf)
    return (log_weights.softmax(dim=1) @ flat_y).reshape(x.shape).to(x.dtype)


@dataclasses.dataclass
class STFLoss:
    """λ(σ)(D(y + σn; σ) − Σ w_j y_j)², with EDM's λ, noise levels and order of random numbers."""

    P_mean: float = P_MEAN
    P_std: float = P_STD
    sigma_data: float = SIGMA_DATA

    def __call__(self, net, images, labels=None, augment_pipe=None):
        """Loss of each element, float32 like `images` [B, C, H, W] in [−1, 1]; `net` may be wrapped in DDP."""
        sigma = sample_edm_sigma(len(images), images.device, self.P_mean, self.P_std)
        y, augment_labels = augment(images, augment_pipe)
        x = y + torch.randn_like(y) * sigma
        conditions = [v for v in (labels, augment_labels) if v is not None]
        target = posterior_mean(x, sigma, y, torch.cat(conditions, dim=1) if conditions else None)
        return edm_loss_weight(sigma, self.sigma_data) * (net(x, sigma, labels, augment_labels=augment_labels)
                                                          - target) ** 2


STF = System(
    name='stf',
    title='STF',
    paper='Xu et al. 2023, stable target fields',
    network_class=EDMPrecond,
    loss=loss_for(STFLoss),
    sampler=make_edm_sampler,
    sample_options=COMMON_SAMPLE_OPTIONS + ABLATION_OPTIONS,
)
