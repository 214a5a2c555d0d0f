"""Denoising losses (Karras et al. 2022, Table 1): weight(σ)·(D(y + σn; σ) − y)², one value per element.

Random numbers come from the global generator of the images' device in this order: the noise-level
variate [B, 1, 1, 1], the augmentation, the noise.

Each loss is called as loss(net, images, labels=None, augment_pipe=None).

Args:
    net: A preconditioned denoiser (see training.precond).
    images: float32 [B, C, H, W] in [−1, 1].
    labels: [B, label_dim], or None.
    augment_pipe: images → (images, augment_labels), or None.

Returns:
    float32, shaped like images, not reduced.
"""

import dataclasses

import torch

from training.pixels import SIGMA_DATA
from training.schedules import VE_SIGMA_MAX, VE_SIGMA_MIN, VP_BETA_D, VP_BETA_MIN, VP_EPSILON_T, vp_sigma

# EDM's training noise levels: mean and standard deviation of ln σ.
P_MEAN, P_STD = -1.2, 1.2


def augment(images, augment_pipe=None):
    """(y, augment_labels): the augmented images and their labels, or the images as they are and None."""
    return (images, None) if augment_pipe is None else augment_pipe(images)


def denoising_loss(net, images, labels, augment_pipe, sigma, weight):
    """weight·(D(y + σn; σ) − y)²; sigma and weight are [B, 1, 1, 1]."""
    y, augment_labels = augment(images, augment_pipe)
    n = torch.randn_like(y) * sigma
    D_yn = net(y + n, sigma, labels, augment_labels=augment_labels)
    return weight * (D_yn - y) ** 2


def sample_edm_sigma(batch, device, P_mean=P_MEAN, P_std=P_STD):
    """Draw EDM's training noise levels, ln σ ~ N(P_mean, P_std²): float32 [batch, 1, 1, 1]."""
    return (torch.randn([batch, 1, 1, 1], device=device) * P_std + P_mean).exp()


def edm_loss_weight(sigma, sigma_data=SIGMA_DATA):
    """EDM's λ(σ) = (σ² + σ_d²)/(σσ_d)², which makes the loss at initialisation 1 at every σ."""
    return (sigma ** 2 + sigma_data ** 2) / (sigma * sigma_data) ** 2


@dataclasses.dataclass
class VPLoss:
    """Time uniform between epsilon_t and 1, weight 1/σ²."""
    beta_d: float = VP_BETA_D
    beta_min: float = VP_BETA_MIN
    epsilon_t: float = VP_EPSILON_T

    def __call__(self, net, images, labels=None, augment_pipe=None):
        u = torch.rand([images.shape[0], 1, 1, 1], device=images.device)
        sigma = vp_sigma(1 + u * (self.epsilon_t - 1), self.beta_d, self.beta_min)
        return denoising_loss(net, images, labels, augment_pipe, sigma, weight=1 / sigma ** 2)


@dataclasses.dataclass
class VELoss:
    """Log-uniform noise level between sigma_min and sigma_max, weight 1/σ²."""
    sigma_min: float = VE_SIGMA_MIN
    sigma_max: float = VE_SIGMA_MAX

    def __call__(self, net, images, labels=None, augment_pipe=None):
        u = torch.rand([images.shape[0], 1, 1, 1], device=images.device)
        sigma = self.sigma_min * (self.sigma_max / self.sigma_min) ** u
        return denoising_loss(net, images, labels, augment_pipe, sigma, weight=1 / sigma ** 2)


@dataclasses.dataclass
class EDMLoss:
    """Log-normal noise level, weight λ(σ)."""
    P_mean: float = P_MEAN
    P_std: float = P_STD
    sigma_data: float = SIGMA_DATA

    def __call__(self, net, images, labels=None, augment_pipe=None):
        sigma = sample_edm_sigma(images.shape[0], images.device, self.P_mean, self.P_std)
        weight = edm_loss_weight(sigma, self.sigma_data)
        return denoising_loss(net, images, labels, augment_pipe, sigma, weight)
