"""Losses: equal to the recorded ones, drawn in the stated order, and of the stated weight."""

import math

import pytest
import torch

from training.augment import AugmentPipe
from training.loss import EDMLoss, VELoss, VPLoss, edm_loss_weight, sample_edm_sigma
from training.precond import edm_scalings
from training.schedules import vp_sigma

LOSSES = {'vp': VPLoss, 've': VELoss, 'edm': EDMLoss}


def toy_net(x, sigma, labels=None, augment_labels=None):
    return x * 0.25 / (0.25 + sigma ** 2) + 0.05 * torch.tanh(x)


def images_of(n=6):
    return torch.rand([n, 3, 8, 8], generator=torch.Generator().manual_seed(0)) * 2 - 1


class Spy:
    """A net that answers with zeros and remembers how it was called."""

    def __call__(self, x, sigma, labels, augment_labels=None):
        self.x, self.sigma, self.labels, self.augment_labels = x, sigma, labels, augment_labels
        return torch.zeros_like(x)


def assert_equals_record(golden, name, loss, rel, augment_pipe=None):
    """Assert agreement within `rel` of each image's largest recorded value."""
    record = golden('losses')
    images = torch.from_numpy(record.arrays['images_u8']).float() / 127.5 - 1
    torch.manual_seed(record.meta['seed'])
    actual = loss(toy_net, images, augment_pipe=augment_pipe)
    expected = torch.from_numpy(record.arrays[name])
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert ((actual - expected).abs().amax((1, 2, 3)) <= rel * expected.abs().amax((1, 2, 3))).all()


@pytest.mark.parametrize('name', LOSSES)
def test_equals_record(golden, name):
    """Exact on CPUs with AVX2; on others, PyTorch's normal variates have another last digit."""
    assert_equals_record(golden, f'loss_{name}', LOSSES[name](), rel=3e-6)


def test_equals_record_with_augmentation(golden):
    """Warped pixels differ from the record's by 1e-5 (tests/test_augment.py), which the loss multiplies by up to 11.

    Its values reach 9 to 15 in each image, so that is 1e-5 of the largest.
    """
    pipe = AugmentPipe(**golden('losses').meta['augment'])
    assert_equals_record(golden, 'loss_edm_aug', EDMLoss(), 5e-5, pipe)


@pytest.mark.parametrize('name', LOSSES)
def test_noise_level_then_augmentation_then_noise(name):
    images, labels, net = images_of(), torch.eye(6), Spy()

    def pipe(x):
        return x.flip(3) * torch.rand([1]), torch.rand([len(x), 2])

    torch.manual_seed(7)
    loss = LOSSES[name]()(net, images, labels, augment_pipe=pipe)

    torch.manual_seed(7)
    variate = (torch.randn if name == 'edm' else torch.rand)([6, 1, 1, 1])
    sigma = {'vp': lambda: vp_sigma(1 + variate * (1e-5 - 1)), 've': lambda: 0.02 * 5000 ** variate,
             'edm': lambda: (-1.2 + 1.2 * variate).exp()}[name]()
    y, augment_labels = pipe(images)
    n = torch.randn(images.shape)
    assert torch.allclose(net.sigma, sigma, rtol=1e-6)
    assert torch.allclose(net.x, y + sigma * n, rtol=1e-5, atol=1e-6)
    assert torch.equal(net.augment_labels, augment_labels) and net.labels is labels
    weight = edm_loss_weight(sigma) if name == 'edm' else 1 / sigma ** 2
    assert torch.allclose(loss, weight * y ** 2, rtol=1e-4)


@pytest.mark.parametrize('name', LOSSES)
def test_perfect_denoiser_has_no_loss(name):
    images = images_of()
    loss = LOSSES[name]()(lambda x, sigma, labels, augment_labels: images, images)
    assert loss.shape == images.shape and not loss.any()


def test_ranges():
    net, images = Spy(), torch.zeros([4096, 1, 1, 1])
    torch.manual_seed(0)
    VELoss()(net, images)
    assert 0.02 <= net.sigma.min() < 0.021 and 95 < net.sigma.max() <= 100
    assert net.sigma.log().mean() == pytest.approx(math.log(0.02 * 100) / 2, abs=0.2)
    VPLoss()(net, images)
    assert vp_sigma(torch.tensor(1e-5)) <= net.sigma.min() and net.sigma.max() <= vp_sigma(torch.tensor(1.0))
    log_sigma = sample_edm_sigma(4096, torch.device('cpu')).log()
    assert log_sigma.mean() == pytest.approx(-1.2, abs=0.08) and log_sigma.std() == pytest.approx(1.2, abs=0.06)


@pytest.mark.parametrize('sigma', [0.01, 0.5, 20.0])
def test_edm_weight_makes_the_first_loss_one(sigma):
    """With F = 0, D = c_skip·x; on data of variance σ_d² its weighted error is 1 on average."""
    g = torch.Generator().manual_seed(0)
    y = torch.randn([200_000], generator=g) * 0.5
    x = y + torch.randn([200_000], generator=g) * sigma
    sigma = torch.tensor(sigma)
    loss = edm_loss_weight(sigma) * (edm_scalings(sigma)[0] * x - y) ** 2
    assert loss.mean() == pytest.approx(1, abs=0.02)
