"""Blur Diffusion (Lee, Chung, Kim and Ye, 2022): a variance-preserving chain that blurs and adds noise.

At level i of N the signal's scale is √Ā_i, with Ā_i = ᾱ_i exp(−λσ² Σ_{j≤i} f(j)), and the noise's is √(1 − Ā_i); one
step of the chain has B_i = 1 − α_i exp(−λσ² f(i)) (Proposition 1). The network predicts ε with the loss of Eq. 10.

What differs from the paper, or is left open there:
- The basis is the DCT, with exp(−λσ²/2) as eigenvalues of W. Theirs are the eigenvectors of a sampled kernel of
  0.4 pixels with zero padding, 1-D eigenvalues floored at 0.03; ours blurs about twice as much per unit of f.
- In Eq. 7, 8, 9 and 12 the exponent of (I − Ā) is taken to be −1/2, as the ε of Eq. 4 requires.
- Eq. 12 steps from i to i − 1 with B_{i+1}, W_{i+1}, which do not exist at N; we use B_i and W_i.
- The last step adds no noise, as usual in score-based samplers (Eq. 12 read literally would add √B_1 z).
- With fewer steps than N, the chain is that between the levels visited, whose factor and B follow from `warm.bands`.
  Eq. 12 is a first-order rule that suffers from long steps; --reverse-step=ancestral draws from the posterior instead.
  Since that divides by the step's factor a_t/a_s, its steps are limited too (MAX_LOG_GAIN).
- Linear f is f(N)·i/N; the paper only names it in a figure. The loss weight λ(i) is 1. Level i goes into the embedding
  unscaled.
- Their network (LSUN 64×64): --arch=adm --cbase=128 --cres=1,2,3,4 --dropout=0 --augment=0 --batch=16 --lr=5e-5
  --lr-rampup=0 (App. B; App. G says 1e-5; neither mentions a warm-up). The paper has no CIFAR-10 result; the defaults
  are those for LSUN.
"""

import dataclasses
import functools
import math

import click
import torch

from dnnlib import UserError, chosen
from torch_utils.constants import constant
from torch_utils.distributed import unwrapped
from training.loss import augment
from training.precond import Precond
from training.samplers import check_steps, evaluate
from training.system import Option, System
from warm.bands import MAX_LEVELS, Bands, ancestral_noise_step, diffuse, spread_levels, transition_moments
from warm.blur import dct2, frequencies, idct2

# f(i)/f(N) at level i of N (appendix B), i = 1 … N.
F_TYPES = {
    'quartic': lambda i, N: (i / N) ** 4,
    'linear': lambda i, N: i / N,
    'log': lambda i, N: i.log() / math.log(N),
    'none': lambda i, N: torch.zeros_like(i),
}
F_FINAL = {'quartic': 0.14, 'linear': 0.14, 'log': 0.6, 'none': 0.0}  # f(N); linear's is ours

# ln of the largest a_s/a_t allowed in an ancestral step. The step multiplies errors of ε̂ by that: beyond the limit,
# the network's float32 rounding alone would become as large as the image.
MAX_LOG_GAIN = -math.log(torch.finfo(torch.float32).eps)


@dataclasses.dataclass(frozen=True)
class LeeChain:
    """The chain of levels 0 … N.

    Attributes:
        f_type: Blur schedule, a name in F_TYPES.
        f_final: f(N); None takes the default for that schedule, F_FINAL.
        num_levels: N.
        sigma: Unit of blur, in pixels.
        beta_min, beta_max: Ends of the linear noise schedule.
    """

    f_type: str = 'quartic'
    f_final: float | None = None
    num_levels: int = 1000
    sigma: float = 0.4
    beta_min: float = 1e-4
    beta_max: float = 0.02

    def __post_init__(self):
        chosen('--f-type', self.f_type, F_TYPES)
        if self.f_final is not None and not (math.isfinite(self.f_final) and self.f_final >= 0):
            raise UserError(f'--f-final={self.f_final} is not a valid amount of blur; give a number ≥ 0, such as 0.14')
        if not 1 <= self.num_levels <= MAX_LEVELS:
            raise UserError(f'num_levels={self.num_levels} is not a valid length of the chain; give 1 to {MAX_LEVELS}')

    @constant
    def sums(self, device=torch.device('cpu')):
        """(ln ᾱ_i, Σ_{j≤i} f(j)) for i = 0 … N: two float64 tensors."""
        i = torch.arange(1, self.num_levels + 1, dtype=torch.float64, device='cpu')
        beta = torch.linspace(self.beta_min, self.beta_max, self.num_levels, dtype=torch.float64, device='cpu')
        f_final = F_FINAL[self.f_type] if self.f_final is None else self.f_final
        f = f_final * F_TYPES[self.f_type](i, self.num_levels)
        return tuple(torch.cat([v.new_zeros([1]), v.cumsum(0)]).to(device) for v in (torch.log1p(-beta), f))

    def log_power(self, i, frequency):
        """ln Ā at level i (integer tensor) in bands with λ = frequency (float64 tensor); their shapes broadcast."""
        log_alpha, f = (table.take(i) for table in self.sums(i.device))
        return log_alpha - frequency * self.sigma ** 2 * f

    def at(self, i, n):
        """`Bands` of N×N images at level i, an integer tensor ([] or [B, 1, 1, 1]) in 0…N on their device."""
        log_power = self.log_power(i, frequencies(n, i.device))
        # √Ā as exp of half the log: Ā itself underflows.
        return Bands(log_power / 2, (-torch.expm1(log_power)).sqrt())

    def log_gain(self, levels, n):
        """ln of the largest a_s/a_t over all bands of N×N images and all steps t → s between successive `levels`."""
        highest = self.log_power(torch.tensor(levels, device='cpu'), frequencies(n)[-1, -1])
        return highest.diff().max().item() / 2


class LeePrecond(Precond):
    """ε̂ = net(x_i, i): the second argument, σ in other networks, is the level i in 1…N.

    Args:
        f_type, f_final, num_levels: See `LeeChain`.
    """

    def __init__(self, *args, f_type=LeeChain.f_type, f_final=LeeChain.f_final, num_levels=LeeChain.num_levels,
                 **network):
        constants = dict(f_type=f_type, f_final=f_final, num_levels=num_levels)
        process = LeeChain(**constants)
        super().__init__(constants, 1, num_levels, 1, *args, **network)
        self.process = process

    def scalings(self, sigma):
        return 0, 1, 1, sigma


def lee_loss(net, images, labels=None, augment_pipe=None):
    """(ε̂ − ε)², level uniform in 1…N (Eq. 10); `net` may be wrapped. Draws i [B, 1, 1, 1], augmentation, ε."""
    process = unwrapped(net).process
    i = torch.randint(1, process.num_levels + 1, [len(images), 1, 1, 1], device=images.device)
    y, augment_labels = augment(images, augment_pipe)
    eps = torch.randn_like(y)
    x_i = diffuse(y, eps, process.at(i, y.shape[-1]))
    return (net(x_i, i, labels, augment_labels=augment_labels) - eps) ** 2


def eq12_step(x, eps, here, there, z=None):
    """x′ = x + H(x) − U B (I−Ā)^−½ Uᵀ ε̂ + U B^½ Uᵀ z, H(x) = x − U a_{i|i′} Uᵀ x (Eq. 12).

    Args:
        x: State [B, C, N, N] of unit variance where it is noise; images are in [−1, 1].
        eps: The network's ε̂, shaped like x.
        here, there: `Bands` at levels i ≥ 1 and i′ < i (`LeeChain.at`). At i = 0 there is no noise to divide by.
        z: Standard normal noise shaped like x; None adds no noise.

    Returns:
        The next state, float64 [B, C, N, N].
    """
    ratio, B = transition_moments(there, here)
    u = (2 - ratio) * dct2(x) - B / here.noise * dct2(eps)
    return idct2(u if z is None else u + B.sqrt() * dct2(z))


REVERSE_STEPS = {'eq12': eq12_step, 'ancestral': ancestral_noise_step}
DEFAULT_STEP = 'eq12'


def lee_sampler(net, latents, class_labels=None, randn_like=torch.randn_like, num_steps=LeeChain.num_levels,
                reverse_step=DEFAULT_STEP):
    """Reverse diffusion from level N to 0 in num_steps steps, one evaluation each.

    Args:
        net: ε-predictor with a `process`.
        latents: Standard normal [B, C, N, N].
        class_labels: [B, label_dim], or None.
        randn_like: Source of the noise, called once per step.
        num_steps: Number of steps, at most the chain's.
        reverse_step: A name in REVERSE_STEPS.

    Returns:
        float64 images [B, C, N, N]; the last step adds no noise.
    """
    levels = spread_levels(num_steps, net.process.num_levels)
    x = latents.to(torch.float64)
    for i, i_next in zip(levels[:-1], levels[1:]):
        here, there = (net.process.at(torch.full([], j, device=x.device), x.shape[-1]) for j in (i, i_next))
        z = randn_like(x)
        x = REVERSE_STEPS[reverse_step](x, evaluate(net, x, i, class_labels), here, there, z if i_next else None)
    return x


def check_gain(net, num_steps):
    """Raise UserError if, with so few steps, the ancestral step would make rounding errors as large as the image."""
    process = net.process
    gain = process.log_gain(spread_levels(num_steps, process.num_levels), net.img_resolution)
    if gain > MAX_LOG_GAIN:
        raise UserError(f'--reverse-step=ancestral with --steps={num_steps} would multiply errors of the network by up '
                        f'to 1e{gain / math.log(10):.0f}, which float32 is not exact enough for; use '
                        f'--reverse-step=eq12, or more --steps (at most {process.num_levels})')


def make_lee_sampler(net, num_steps=None, reverse_step=DEFAULT_STEP):
    """`lee_sampler` with its options checked; by default as many steps as the chain has."""
    num_steps = net.process.num_levels if num_steps is None else num_steps
    check_steps(num_steps, at_most=net.process.num_levels)
    chosen('--reverse-step', reverse_step, REVERSE_STEPS)
    if reverse_step == 'ancestral':
        check_gain(net, num_steps)
    return functools.partial(lee_sampler, num_steps=num_steps, reverse_step=reverse_step)


LEE = System(
    name='lee',
    title='Blur Diffusion',
    paper='Lee et al. 2022',
    network_class=LeePrecond,
    loss=lambda net: lee_loss,
    sampler=make_lee_sampler,
    sample_options=('num_steps',),
    own_sample_options=(
        Option('reverse_step', DEFAULT_STEP, 'Reverse step of the sampler', type=click.Choice(list(REVERSE_STEPS))),
    ),
    network_options=(
        Option('f_type', LeeChain.f_type, 'Blur schedule f', type=click.Choice(list(F_TYPES))),
        Option('f_final', LeeChain.f_final, 'f at the last level', type=float,
               shown=', '.join(f'{v:g} {k}' for k, v in F_FINAL.items() if v)),
    ),
    predicts_images=False,
)
