"""Warm's loss: by hand, in the stated draw order, as reported, and 0 where the answer is known."""

import pytest
import torch

from tests.warm_examples import TABLE_5, Spy, by_hand, example_of, images_of
from torch_utils import training_stats
from training.loss import EDMLoss, edm_loss_weight
from warm.blur import blur, rest
from warm.loss import WarmLoss
from warm.targets import TARGETS, Example, Hot, Residual

FAMILIES = ['0', '0.5', '0,0.5,2', '0.1-2', 'blurring']


def pipe(x):
    return x.flip(3) * torch.rand([1]), torch.rand([len(x), 2])


@pytest.mark.parametrize('augment_pipe', [None, pipe], ids=['plain', 'augmented'])
@pytest.mark.parametrize('family', FAMILIES)
def test_noise_level_then_bnr_then_augmentation_then_noise(family, augment_pipe):
    images, labels, net = images_of(), torch.eye(6), Spy(family)
    torch.manual_seed(7)
    loss = WarmLoss()(net, images, labels, augment_pipe=augment_pipe)

    torch.manual_seed(7)
    sigma, alpha, y, augment_labels, n = by_hand(family, images, augment_pipe)
    torch.testing.assert_close(net.sigma, sigma)
    torch.testing.assert_close(torch.as_tensor(net.alpha), alpha)
    torch.testing.assert_close(net.x, blur(y, alpha) + sigma * n, rtol=1e-5, atol=1e-5)
    assert net.labels is labels
    assert net.augment_labels is None if augment_pipe is None else torch.equal(net.augment_labels, augment_labels)
    squares = blur(y, alpha) ** 2 + rest(y, alpha) ** 2  # estimates of 0
    assert loss.shape == images.shape and loss.dtype == torch.float32
    torch.testing.assert_close(loss, edm_loss_weight(sigma) * squares, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('targets', TARGETS)
@pytest.mark.parametrize('family', FAMILIES[1:])
def test_terms_of_every_parametrisation(family, targets):
    """With estimates of 0, the loss is λ(β)·Σ target² over the branches, the targets being those of the drawn input."""
    images, net = images_of(), Spy(family, targets)
    torch.manual_seed(7)
    loss = WarmLoss()(net, images)
    torch.manual_seed(7)
    sigma, alpha, y, _, n = by_hand(family, images)
    wanted = net.parametrisation.targets(example_of(y, n, sigma, alpha))
    torch.testing.assert_close(loss, edm_loss_weight(sigma) * sum(t ** 2 for t in wanted), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('targets', TABLE_5)
def test_targets_of_table_5(targets):
    example = Example('images', 'blurred', 'rest', 'noise', 'beta', 'alpha', 0.5)
    assert TARGETS[targets].targets(example) == TABLE_5[targets]
    assert Hot().targets(example) == ('images',)


class OneName(Residual):
    names = ('denoise',)


class OneTarget(Residual):
    def targets(self, example):
        return (example.blurred,)


@pytest.mark.parametrize('parametrisation, branches', [(OneName(), 2), (OneTarget(), 2), (Residual(), 1),
                                                       (Residual(), 3)])
def test_every_branch_has_a_name_an_estimate_and_a_target(parametrisation, branches):
    """Without this check, a missing one would go unnoticed, and only the other branches would train."""
    net = Spy('0.5')
    net.parametrisation, net.estimates = parametrisation, lambda x: (x,) * branches
    with pytest.raises(ValueError, match='zip'):
        WarmLoss()(net, images_of())


@pytest.mark.parametrize('targets', TARGETS)
@pytest.mark.parametrize('family', FAMILIES)
def test_reported_terms_add_up(family, targets):
    training_stats.Collector().update()  # what other tests reported
    net, collector = Spy(family, targets), training_stats.Collector()
    loss = WarmLoss()(net, images_of())
    collector.update()
    reported = collector.as_dict()
    assert list(reported) == sorted(f'Loss/{name}' for name in net.parametrisation.names)
    assert sum(term['mean'] for term in reported.values()) == pytest.approx(loss.mean().item(), rel=1e-5)
    assert all(term['num'] == loss.numel() for term in reported.values())


def test_default_terms_are_denoise_and_deblur():
    training_stats.Collector().update()
    collector = training_stats.Collector()
    WarmLoss()(Spy('0.5'), images_of())
    collector.update()
    assert set(collector.as_dict()) == {'Loss/denoise', 'Loss/deblur'}


class Knowing(Spy):
    """A network that knows the one image there is."""

    def __init__(self, image, family, targets):
        super().__init__(family, targets)
        self.image = image

    def estimates(self, x):
        y = self.image.expand(x.shape)
        noise = (x - blur(y, self.alpha)) / self.sigma
        return self.parametrisation.targets(example_of(y, noise, self.sigma, self.alpha))


@pytest.mark.parametrize('targets', TARGETS)
@pytest.mark.parametrize('family', FAMILIES)
def test_a_perfect_network_has_no_loss(family, targets):
    image = images_of(1)
    loss = WarmLoss()(Knowing(image, family, targets), image.expand(6, -1, -1, -1))
    assert loss.abs().max() < 1e-6


def test_bnr_0_is_the_loss_of_edm():
    class Net(Spy):
        def __call__(self, x, sigma, labels, augment_labels=None, **own):
            out = x * 0.25 / (0.25 + sigma ** 2) + 0.05 * torch.tanh(x)
            return (out,) if own else out

    losses = []
    for loss in (WarmLoss(), EDMLoss()):
        torch.manual_seed(7)
        losses.append(loss(Net('0'), images_of(), augment_pipe=pipe))
    assert torch.equal(*losses)


def test_constants():
    net = Spy('0.5')
    torch.manual_seed(3)
    loss = WarmLoss(P_mean=0.5, P_std=0.1, sigma_data=1.0)(net, images_of())
    torch.manual_seed(3)
    sigma = (torch.randn([6, 1, 1, 1]) * 0.1 + 0.5).exp()
    torch.testing.assert_close(net.sigma, sigma)
    y, alpha = images_of(), 0.5 * sigma
    expected = (sigma ** 2 + 1) / sigma ** 2 * (blur(y, alpha) ** 2 + rest(y, alpha) ** 2)
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-5)


def test_works_through_a_wrapper():
    """The loss is the same through DDP, which is called in the network's place and keeps it as `module`."""
    class Wrapped:
        def __init__(self, module):
            self.module = module

        def __call__(self, *args, **kwargs):
            return self.module(*args, **kwargs)

    losses = []
    for net in (Spy('0.1-2'), Wrapped(Spy('0.1-2'))):
        torch.manual_seed(7)
        losses.append(WarmLoss()(net, images_of()))
    assert torch.equal(*losses)
