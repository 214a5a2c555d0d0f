"""PFGM++ (Xu, Liu, Tian, Tong, Tegmark and Jaakkola, ICML 2023): EDM with heavy-tailed noise from D extra dimensions.

The perturbation of an N-dimensional image at noise level σ has a uniform direction and the radius
R = r·√(Beta-prime(N/2, D/2)), r = σ√D; D → ∞ is EDM. A Beta-prime variable is a quotient of Gamma variables,
χ²_N/χ²_D, and |n|² of standard normal noise n is χ²_N, independent of its direction. So the perturbation is

    σ·n/√(χ²_D/D),

multivariate Student's t noise with D degrees of freedom, and it is drawn this way, in float64. The ODE in σ is
EDM's, and the sampler starts from the same distribution at σ_max.

What is ours: network, noise levels and weight are EDM's (as in the paper's experiments on CIFAR-10); churn is
refused, since the perturbation plus its Gaussian noise is none of these distributions.
"""

import dataclasses
import functools

import torch

from dnnlib import UserError
from training.loss import P_MEAN, P_STD, augment, edm_loss_weight, sample_edm_sigma
from training.precond import SIGMA_DATA, Precond, edm_scalings
from training.samplers import edm_sampler
from training.system import GRID_OPTIONS, Option, System, loss_for
from warm.samplers import grid_options

AUG_DIM = 2048  # the paper's best on CIFAR-10
MAX_AUG_DIM = 10 ** 9  # the paper tries up to 3·10⁶


class PFGMPPPrecond(Precond):
    """EDM's network, with the number of extra dimensions it is trained for.

    Args:
        sigma_min, sigma_max: Supported noise levels.
        sigma_data: Standard deviation of the data.
        aug_dim: D ≥ 1.
    """

    def __init__(self, *args, sigma_min=0, sigma_max=float('inf'), sigma_data=SIGMA_DATA, aug_dim=AUG_DIM, **network):
        if not 1 <= aug_dim <= MAX_AUG_DIM:
            raise UserError(f'--aug-dim={aug_dim} is not a valid number of extra dimensions; give a whole number from '
                            f'1 to {MAX_AUG_DIM}, or use --precond=edm for infinitely many')
        super().__init__(dict(sigma_min=sigma_min, sigma_max=sigma_max, sigma_data=sigma_data, aug_dim=aug_dim),
                         sigma_min, sigma_max, 1, *args, **network)

    def scalings(self, sigma):
        return edm_scalings(sigma, self.sigma_data)


def heavy_tailed(normal, chi_square, aug_dim):
    """n/√(χ²_D/D), the perturbation at σ = 1: standard normal [B, C, H, W] and χ²_D [B, 1, 1, 1] in, float64 out."""
    return normal.to(torch.float64) / (chi_square / aug_dim).sqrt()


def chi_square_of(z, aug_dim):
    """χ²_D as a function of a standard normal variable z (its quantile at Φ(z)): float64, shape and device of z."""
    from scipy import special  # here, because its tenth of a second would be part of every command's start
    variate = z.to('cpu', torch.float64).numpy()
    # From the smaller of Φ(z) and Φ(−z), so that both tails keep their precision.
    p = special.ndtr(-abs(variate))
    half = torch.where(z.cpu() < 0, torch.as_tensor(special.gammaincinv(aug_dim / 2, p)),
                       torch.as_tensor(special.gammainccinv(aug_dim / 2, p)))
    return (2 * half).to(z.device)


@dataclasses.dataclass
class PFGMPPLoss:
    """EDM's loss with the heavy-tailed perturbation. Draws ln σ's variate, the augmentation, n, χ²_D [B, 1, 1, 1]."""

    aug_dim: int = AUG_DIM
    sigma_data: float = SIGMA_DATA
    P_mean: float = P_MEAN
    P_std: float = P_STD

    def __call__(self, net, images, labels=None, augment_pipe=None):
        """Loss of each element, float32 like `images` [B, C, H, W] in [−1, 1]; `net` may be wrapped in DDP."""
        sigma = sample_edm_sigma(len(images), images.device, self.P_mean, self.P_std)
        y, augment_labels = augment(images, augment_pipe)
        n = torch.randn_like(y)
        freedom = torch.full([len(y), 1, 1, 1], float(self.aug_dim), dtype=torch.float64, device=y.device)
        # Not torch's Chi2, which would copy its rate ½ to the device and wait for it.
        gamma = torch.distributions.Gamma(freedom / 2, torch.full_like(freedom, 0.5), validate_args=False)
        chi_square = gamma.sample()
        noise = (sigma * heavy_tailed(n, chi_square, self.aug_dim)).to(y.dtype)
        D_yn = net(y + noise, sigma, labels, augment_labels=augment_labels)
        return edm_loss_weight(sigma, self.sigma_data) * (D_yn - y) ** 2


def with_heavy_tails(sampler):
    """`sampler` started from PFGM++'s prior, which first takes one normal variate per image from `randn_like`."""
    def sample(net, latents, class_labels=None, randn_like=torch.randn_like):
        z = randn_like(latents.new_empty([len(latents), 1, 1, 1], dtype=torch.float64))
        start = heavy_tailed(latents, chi_square_of(z, net.aug_dim), net.aug_dim)
        return sampler(net, start, class_labels, randn_like)
    return sample


def make_pfgmpp_sampler(net, **options):
    """EDM's sampler without churn from the heavy-tailed prior, its options checked."""
    return with_heavy_tails(functools.partial(edm_sampler, **grid_options(net, options)))


PFGMPP = System(
    name='pfgmpp',
    title='PFGM++',
    paper='Xu et al. 2023, PFGM++',
    network_class=PFGMPPPrecond,
    loss=loss_for(PFGMPPLoss),
    sampler=make_pfgmpp_sampler,
    sample_options=GRID_OPTIONS,
    network_options=(
        Option('aug_dim', AUG_DIM, 'Number of extra dimensions, D', type=int),
    ),
)
