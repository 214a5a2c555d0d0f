"""What the tests of Warm's network, loss and choices use: images, small networks, the loss's draws by hand."""

import torch

from training.precond import edm_scalings
from warm.blur import blur, frequencies, rest
from warm.path import parse_family
from warm.precond import WarmPrecond
from warm.targets import TARGETS, Example, Hot, Point

SMALL = dict(img_resolution=8, img_channels=3, model_channels=8, channel_mult=[1, 2], num_blocks=1,
             attn_resolutions=[4], model_type='SongUNet')
TABLE_5 = {'residual': ('blurred', 'rest'), 'clean': ('images',), 'blurred': ('blurred',),
           'clean-blurred': ('blurred', 'images')}  # the paper's four and what their branches learn


def family_of(text):
    """The family of a --bnr text, or of the schedule 'blurring'."""
    return parse_family(None, text) if text == 'blurring' else parse_family(text)


def images_of(n=6):
    """The same n images each time, in [−1, 1]."""
    return torch.rand([n, 3, 8, 8], generator=torch.Generator().manual_seed(0)) * 2 - 1


def seeded(network_class, perturb=True, **kwargs):
    """A network from a fixed seed; with `perturb`, its weights are moved away from their (often zero) start."""
    torch.manual_seed(0)
    net = network_class(**{**SMALL, **kwargs})
    if perturb:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    return net


def warm_net(**kwargs):
    """Warm's network from a fixed seed, in evaluation mode."""
    return seeded(WarmPrecond, **kwargs).eval()


def batch(n=4, label_dim=0):
    """(x, sigma, labels or None), with noise levels far apart."""
    g = torch.Generator().manual_seed(2)
    x, sigma = torch.randn([n, 3, 8, 8], generator=g), torch.linspace(-3, 3, n).exp()
    return x, sigma, torch.eye(label_dim)[torch.arange(n) % label_dim] if label_dim else None


def outputs_of(net, x, sigma, alpha):
    """The branches of F, the U-Net's output, by definition."""
    sigma = sigma.reshape(-1, 1, 1, 1)
    _, _, c_in, c_noise = edm_scalings(sigma)
    F = net.model(c_in * x, c_noise.flatten(), None, extra_embedding=net.map_blur(alpha))
    return F.split(3, dim=1)


def point_of(x, beta, alpha):
    """What a parametrisation is told, with σ_data = 0.5."""
    return Point(x, beta, alpha, *edm_scalings(beta), sigma_data=0.5, rest_scale='prior')


def example_of(images, noise, beta, alpha):
    """What a parametrisation takes its targets from, with σ_data = 0.5."""
    return Example(images, blur(images, alpha), rest(images, alpha), noise, beta, alpha, sigma_data=0.5)


def by_hand(family, images, augment_pipe=None):
    """(sigma, alpha, y, augment_labels, noise), drawn from the global generator in the stated order."""
    sigma = (torch.randn([len(images), 1, 1, 1]) * 1.2 - 1.2).exp()
    if family == '0,0.5,2':
        alpha = sigma * torch.tensor([0, 0.5, 2])[torch.randint(3, [len(images), 1, 1, 1])]
    elif family == '0.1-2':
        alpha = sigma * 0.1 * 20 ** torch.rand([len(images), 1, 1, 1])
    elif family == 'blurring':
        alpha = 20 * sigma ** 2 / (1 + sigma ** 2)
    else:
        alpha = sigma * float(family)
    y, augment_labels = augment_pipe(images) if augment_pipe else (images, None)
    return sigma, alpha, y, augment_labels, torch.randn(images.shape)


class Spy:
    """A network that estimates zeros and records what it was called with."""

    def __init__(self, family, targets='residual'):
        self.family = family_of(family)
        self.parametrisation = Hot() if self.family.is_hot else TARGETS[targets]
        self.rates = frequencies
        self.point = point_of

    def __call__(self, x, sigma, labels, alpha, return_estimates, augment_labels=None):
        assert return_estimates
        self.x, self.sigma, self.labels, self.alpha, self.augment_labels = x, sigma, labels, alpha, augment_labels
        return self.estimates(x)

    def estimates(self, x):
        return tuple(torch.zeros_like(x) for _ in self.parametrisation.names)
