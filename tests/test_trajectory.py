"""warm.trajectory: a watched network answers as the network itself, and what is shown of each system can be seen."""

import pytest
import torch

from training.dataset import EMBEDDED
from training.pixels import to_uint8
from warm.systems import SYSTEMS
from warm.trajectory import Frame, Watch, visible, watch

TINY = dict(img_resolution=8, img_channels=1, model_type='SongUNet', model_channels=8, channel_mult=[1], num_blocks=1)


def network(name, **kwargs):
    torch.manual_seed(0)
    return SYSTEMS[name].network_class(**TINY, **kwargs).eval().requires_grad_(False)


def images():
    return torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize('sigma', [1.0, torch.full([2], 1.0)])
@pytest.mark.parametrize('args, kwargs, alpha', [
    ((), {}, 0.5),  # the network's own path, BNR 0.5
    ((), {'alpha': 2.0}, 2.0),
    ((None, 2.0), {}, 2.0),
    ((None, 2.0, True), {}, 2.0),
    ((), {'alpha': torch.full([2, 1, 1, 1], 2.0)}, 2.0),
])
def test_a_watched_network_takes_what_the_network_takes(sigma, args, kwargs, alpha):
    net = network('warm')
    watched = Watch(net)
    for seen, plain in zip(watched.denoise_deblur(images(), sigma, *args, **kwargs),
                           net.denoise_deblur(images(), sigma, *args, **kwargs)):
        assert torch.equal(seen, plain)
    [seen] = watched.frames
    assert (seen.beta, seen.alpha) == (1.0, pytest.approx(alpha))


def test_states_of_cold_diffusion_are_shown_as_they_are():
    """Their level is a number of blurs, by which the states must not be divided."""
    net = network('cold', cold_steps=20)
    frames = watch(net, SYSTEMS['cold'], [0, 1], {'data': EMBEDDED})
    assert [f.beta for f in frames] == list(range(20, -1, -1))
    for f in frames[:5]:
        assert (visible(f)[0] == to_uint8(f.x).numpy()).all()
        assert visible(f)[0].std() > 30


@pytest.mark.parametrize('beta, spread', [(0.0, 1.0), (0.1, 1.0), (10.0, 10.0), (80.0, 80.0)])
def test_noisy_states_are_scaled_to_the_range_of_images(beta, spread):
    """They are divided by the standard deviation of their noise where it exceeds 1, and otherwise left alone."""
    generator = torch.Generator().manual_seed(1)
    x0, noise = torch.rand(2, 1, 64, 64, generator=generator) * 2 - 1, torch.randn(2, 1, 64, 64, generator=generator)
    x = x0 + beta * noise
    seen = visible(Frame(beta, 0.0, x, x0, torch.zeros_like(x)))[0]
    assert abs(seen.astype(int) - to_uint8(x / spread).numpy().astype(int)).max() <= 3


def test_a_level_is_one_frame_whatever_its_last_digits():
    """Samplers compute a level in more than one way; the later evaluation at a level takes the earlier one's place."""
    watched = Watch(network('edm'))
    for sigma in (3.0, 3 * (1 + 1e-12)):
        watched(images(), torch.tensor(sigma, dtype=torch.float64))
    assert len(watched.frames) == 1
