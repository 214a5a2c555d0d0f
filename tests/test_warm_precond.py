"""The Warm network: EDM's at BNR 0, exact zeros without blur, transfer, and every parametrisation of Table 5."""

import json

import pytest
import torch

from dnnlib import UserError
from tests.warm_examples import SMALL, TABLE_5, batch, by_hand, example_of, outputs_of, point_of, seeded, warm_net
from training.loss import EDMLoss, edm_loss_weight
from training.networks import EDMPrecond
from training.precond import edm_scalings
from training.samplers import edm_sampler
from training.snapshot import build_network, read_snapshot
from warm.blur import blur, blur_mask, filter_bands, rest_magnitude, rest
from warm.choices import REST
from warm.loss import WarmLoss
from warm.path import BlurringSchedule, ConstantBNR, parse_path
from warm.precond import BlurEmbedding, WarmPrecond
from warm.samplers import SOLVERS, warm_sampler
from warm.systems import SYSTEMS
from warm.targets import TARGETS, Hot, Parametrisation, rest_estimate

ADM = dict(img_resolution=8, img_channels=3, model_channels=16, channel_mult=[1, 2], num_blocks=1,
           attn_resolutions=[4], model_type='DhariwalUNet')
FAMILIES = [dict(bnr='0'), dict(), dict(bnr='0.3'), dict(bnr='0,0.1,1'), dict(bnr='0.1-2'),
            dict(bnr_schedule='blurring'), dict(bnr_schedule='blurring:5')]
EVERY_FAMILY = pytest.mark.parametrize('kwargs', FAMILIES, ids=lambda kwargs: '-'.join(kwargs.values()) or 'default')


# -- BNR 0 is EDM

@pytest.mark.parametrize('kwargs', [SMALL, ADM, dict(SMALL, label_dim=3, augment_dim=2)],
                         ids=['song', 'adm', 'labelled'])
def test_bnr_0_is_edm_bit_for_bit(kwargs):
    """From the same seed, tensors, outputs, samples, losses and gradients are the same."""
    edm, warm = (seeded(c, **kwargs, **own) for c, own in ((EDMPrecond, {}), (WarmPrecond, dict(bnr='0'))))
    state, warm_state = edm.state_dict(), warm.state_dict()
    assert list(state) == list(warm_state) and all(torch.equal(state[k], warm_state[k]) for k in state)

    x, sigma, labels = batch(label_dim=kwargs.get('label_dim', 0))
    edm.eval(), warm.eval()
    with torch.no_grad():
        assert torch.equal(edm(x, sigma, labels), warm(x, sigma, labels))
        latents = x.double()
        torch.manual_seed(4)
        images = edm_sampler(edm, latents, labels, num_steps=5, S_churn=3)
        torch.manual_seed(4)
        assert torch.equal(warm_sampler(warm, latents, labels, num_steps=5, S_churn=3), images)

    losses = []
    for net, loss in ((edm.train(), EDMLoss()), (warm.train(), WarmLoss())):
        torch.manual_seed(3)
        pipe = (lambda y: (y.flip(3), torch.rand([len(y), 2]))) if 'augment_dim' in kwargs else None
        losses.append(loss(net, x, labels, augment_pipe=pipe))
        losses[-1].mean().backward()
    assert torch.equal(*losses)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(edm.parameters(), warm.parameters()))


def test_bnr_0_reports_no_rest():
    x, sigma, _ = batch()
    net = warm_net(bnr='0')
    D, R = net.denoise_deblur(x, sigma)
    assert isinstance(net.parametrisation, Hot) and not R.any() and torch.equal(D, net(x, sigma))


# -- images without blur in a network that knows blur

def test_without_blur_there_is_no_rest_and_no_embedding():
    net = warm_net(bnr='0,0.5')
    x, sigma, _ = batch()
    alpha = torch.tensor([0.0, 0.5, 0.0, 3.0])
    D, R = net.denoise_deblur(x, sigma, alpha=alpha)
    assert not R[[0, 2]].any() and R[1].any() and R[3].any()
    with torch.no_grad():
        net.map_blur.linear.weight.normal_()
    D_other, R_other = net.denoise_deblur(x, sigma, alpha=alpha)
    assert torch.equal(D[[0, 2]], D_other[[0, 2]]) and not torch.equal(D[1], D_other[1])
    assert torch.isfinite(D_other).all() and torch.isfinite(R_other).all()


def test_without_blur_gradients_are_finite():
    net = warm_net(bnr='0,0.5')
    x, sigma, _ = batch()
    net(x, sigma, alpha=torch.tensor([0.0, 0.0, 0.5, 0.0])).square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)


def test_blur_embedding():
    torch.manual_seed(0)
    embed = BlurEmbedding(16)
    alpha = torch.tensor([0.0, 1e-6, 0.1, 1.0, 113.0])
    out = embed(alpha)
    assert out.shape == (5, 16) and not out[0].any() and torch.isfinite(out).all()
    assert torch.pdist(out[1:]).min() > 1e-3


# -- D and R

@EVERY_FAMILY
def test_by_default_the_blur_is_that_of_the_path(kwargs):
    net = warm_net(**kwargs)
    x, sigma, _ = batch()
    alpha = net.family.default.alpha(sigma)
    assert torch.equal(net(x, sigma), net(x, sigma, alpha=alpha))


@EVERY_FAMILY
def test_numbers_and_batches_of_blur_and_noise(kwargs):
    net = warm_net(**kwargs)
    x, _, _ = batch()
    one = net(x, 0.5, alpha=0.25 if net.map_blur else 0)
    many = net(x, torch.full([4], 0.5), alpha=torch.full([4, 1, 1, 1], 0.25 if net.map_blur else 0.0))
    torch.testing.assert_close(one, many, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('targets', TARGETS)
def test_the_clean_image_is_d_plus_r(targets):
    net = warm_net(targets=targets)
    x, sigma, _ = batch()
    D, R = net.denoise_deblur(x, sigma)
    assert D.dtype == R.dtype == torch.float32 and D.shape == R.shape == x.shape
    assert torch.equal(net(x, sigma), D + R)
    assert R.mean((2, 3)).abs().max() < 1e-6 * max(1, R.abs().max())


def test_residual_targets_by_definition():
    """D = c_skip·x + c_out·F_D, R = s_R·F_R minus its mean; D's channels come first."""
    net = warm_net()
    x, sigma, _ = batch()
    alpha = 0.5 * sigma
    F_D, F_R = outputs_of(net, x, sigma, alpha)
    c_skip, c_out, _, _ = edm_scalings(sigma.reshape(-1, 1, 1, 1))
    D, R = net.denoise_deblur(x, sigma, alpha=alpha)
    torch.testing.assert_close(D, c_skip * x + c_out * F_D)
    scaled = rest_magnitude(alpha, 8).float().reshape(-1, 1, 1, 1) * F_R
    torch.testing.assert_close(R, scaled - scaled.mean((2, 3), keepdim=True))


@pytest.mark.parametrize('targets', ['clean', 'blurred', 'clean-blurred'])
def test_other_targets_by_definition(targets):
    """Table 5 (a) to (c): every branch is c_skip·x + c_out·F; what is not estimated follows from the branches."""
    net = warm_net(targets=targets)
    x, sigma, _ = batch()
    alpha = 0.5 * sigma
    c_skip, c_out, _, _ = edm_scalings(sigma.reshape(-1, 1, 1, 1))
    branches = [c_skip * x + c_out * F for F in outputs_of(net, x, sigma, alpha)]
    if targets == 'clean':
        D, clean = blur(branches[0], alpha), branches[0]
    elif targets == 'blurred':
        D = branches[0]
        clean = filter_bands(D, 1 / blur_mask(alpha, 8).clamp(min=1e-3))
    else:
        D, clean = branches
    torch.testing.assert_close(net.denoise_deblur(x, sigma, alpha=alpha)[0], D, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(net.denoise_deblur(x, sigma, alpha=alpha)[1], rest(clean, alpha), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('targets', TARGETS)
def test_branches_name_what_they_learn(targets):
    """Estimates equal to the targets give the true D and R."""
    chosen = TARGETS[targets]
    images, noise = batch(8)[0].double().chunk(2)
    beta, alpha = (torch.tensor(v).double().reshape(-1, 1, 1, 1) for v in ([0.01, 0.5, 9, 0.2], [0.1, 0.5, 0.9, 0]))
    example = example_of(images, noise, beta, alpha)
    aims = chosen.targets(example)
    assert len(aims) == len(set(chosen.names)) == len(chosen.names)
    D, R = chosen.parts(aims, point_of(example.blurred + beta * noise, beta, alpha))
    torch.testing.assert_close(D, example.blurred, rtol=0, atol=1e-9)
    torch.testing.assert_close(R, example.rest, rtol=0, atol=1e-9)


# -- training and sampling of everything on offer

@pytest.mark.parametrize('targets', TARGETS)
@EVERY_FAMILY
def test_everything_trains(kwargs, targets):
    """The loss is finite, and its gradient reaches every parameter."""
    net = seeded(WarmPrecond, targets=targets, label_dim=3, augment_dim=2, **kwargs).train()
    x, _, labels = batch(8, label_dim=3)
    loss = WarmLoss()(net, x, labels, augment_pipe=lambda y: (y, torch.rand([len(y), 2])))
    assert loss.shape == x.shape and loss.dtype == torch.float32 and torch.isfinite(loss).all()
    loss.mean().backward()
    without = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without and all(torch.isfinite(p.grad).all() for p in net.parameters())


@pytest.mark.parametrize('solver', SOLVERS)
@pytest.mark.parametrize('targets', TARGETS)
def test_everything_samples(targets, solver):
    for kwargs in (dict(), dict(bnr='0,1'), dict(bnr_schedule='blurring')):
        net = warm_net(targets=targets, **kwargs)
        with torch.no_grad():
            images = warm_sampler(net, batch(2)[0], num_steps=3, solver=solver)
        assert images.shape == (2, 3, 8, 8) and images.dtype == torch.float64 and torch.isfinite(images).all()


class Noise(Parametrisation):
    """ε-prediction: one branch estimates β·ε, the other the rest; D = x − β ε̂."""

    names = ('noise', REST)

    def estimates(self, F, point):
        F_noise, F_R = F
        return point.beta * F_noise, rest_estimate(F_R, point)

    def targets(self, example):
        return example.beta * example.noise, example.rest

    def parts(self, estimates, point):
        noise, R = estimates
        return point.x - noise, R


class Velocity(Parametrisation):
    """v-prediction: v = (σ_d ε − (β/σ_d)·blurred)/√(β²+σ_d²), as c_out·v; D = c_skip·x − c_out·v̂."""

    names = ('velocity', REST)

    def estimates(self, F, point):
        F_v, F_R = F
        return point.c_out * F_v, rest_estimate(F_R, point)

    def targets(self, example):
        beta, power = example.beta, example.sigma_data ** 2
        return beta / (beta ** 2 + power) * (power * example.noise - beta * example.blurred), example.rest

    def parts(self, estimates, point):
        v, R = estimates
        return point.c_skip * point.x - v, R


@pytest.mark.parametrize('parametrisation', [Noise, Velocity])
def test_a_new_target_is_a_class_and_a_line(parametrisation, monkeypatch):
    """It obeys the laws above, learns and draws, and its loss is λ(β) times the squared errors of its D and R."""
    monkeypatch.setitem(TARGETS, 'new', parametrisation())
    test_branches_name_what_they_learn('new')
    test_the_clean_image_is_d_plus_r('new')
    test_everything_trains(dict(bnr='0,0.1,1'), 'new')
    test_everything_samples('new', 'heun')
    test_arguments_go_through_json(dict(), 'new')

    net, images = warm_net(targets='new').train(), batch(8)[0].clamp(-1, 1)
    optimizer, losses = torch.optim.Adam(net.parameters(), lr=1e-2), []
    for _ in range(8):
        torch.manual_seed(3)
        optimizer.zero_grad()
        losses.append(WarmLoss()(net, images).mean())
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]

    torch.manual_seed(3)
    loss = WarmLoss()(net, images)
    torch.manual_seed(3)
    sigma, alpha, y, _, noise = by_hand('0.5', images)
    D, R = net.denoise_deblur(blur(y, alpha) + sigma * noise, sigma)
    error = (D - blur(y, alpha)) ** 2 + (R - rest(y, alpha)) ** 2
    torch.testing.assert_close(loss, edm_loss_weight(sigma) * error, rtol=1e-3, atol=1e-3)


def test_one_network_is_sampled_along_many_paths():
    net, z = warm_net(bnr='0,0.1,0.5'), batch(2)[0]
    with torch.no_grad():
        drawn = [warm_sampler(net, z, num_steps=3, path=ConstantBNR(bnr)) for bnr in (0, 0.1, 0.5)]
        default = warm_sampler(net, z, num_steps=3)
    assert torch.equal(default, drawn[2]) and not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize('options, said', [
    (dict(bnr='0.3'), 'the constant BNRs 0,0.5'), (dict(bnr_schedule='blurring'), 'blurring schedule'),
    (dict(bnr='x'), "'x'"), (dict(bnr='0.5', bnr_schedule='blurring'), 'give one')])
def test_paths_outside_the_training_are_refused(options, said):
    with pytest.raises(UserError) as e:
        SYSTEMS['warm'].sampler(warm_net(bnr='0,0.5'), **options)
    assert said in str(e.value) and '\n' not in str(e.value)


# -- construction

@EVERY_FAMILY
@pytest.mark.parametrize('targets', TARGETS)
def test_arguments_go_through_json(kwargs, targets):
    net = warm_net(targets=targets, label_dim=3, **kwargs)
    twin = WarmPrecond(**json.loads(json.dumps(net.init_kwargs))).eval()
    twin.load_state_dict(net.state_dict())
    x, sigma, labels = batch(label_dim=3)
    assert twin.family == net.family and twin.init_kwargs == net.init_kwargs
    assert type(twin.parametrisation) is type(net.parametrisation)
    assert torch.equal(twin(x, sigma, labels), net(x, sigma, labels))


@pytest.mark.parametrize('kwargs', [dict(bnr='-1'), dict(bnr='0.5,0.5'), dict(bnr='2-1'), dict(bnr='warm'),
                                    dict(bnr_schedule='linear'), dict(targets='no target')])
def test_bad_arguments_are_refused_in_a_sentence(kwargs):
    with pytest.raises(UserError) as e:
        warm_net(**kwargs)
    assert '\n' not in str(e.value)


def test_wrong_images_are_refused():
    with pytest.raises(UserError, match='resize'):
        warm_net()(torch.zeros([1, 3, 4, 4]), 1.0)


def test_number_of_noise_levels_and_blurs():
    x = batch()[0]
    with pytest.raises(UserError, match='noise levels'):
        warm_net()(x, torch.ones(3))


# -- from EDM to Warm

@pytest.mark.parametrize('kwargs', [SMALL, ADM], ids=['song', 'adm'])
@pytest.mark.parametrize('own', [dict(bnr='0'), dict(bnr='0,0.5'), dict(bnr='0.5'), dict(bnr='0.1-2')],
                         ids=lambda own: own['bnr'])
@pytest.mark.parametrize('targets', TABLE_5)
def test_transferred_network_equals_edm_at_bnr_0(kwargs, own, targets):
    """Bit for bit in float32, classes included; the rest, where there is a branch for it, starts at 0."""
    edm = seeded(EDMPrecond, label_dim=3, **kwargs).eval()
    net = seeded(WarmPrecond, perturb=True, label_dim=3, **{**kwargs, **own}, targets=targets).eval()
    copied = net.transfer(edm.state_dict())
    assert set(copied) >= set(edm.state_dict())
    x, sigma, labels = batch(label_dim=3)
    D, R = net.denoise_deblur(x, sigma, labels, alpha=0)
    expected = edm(x, sigma, labels)
    assert torch.equal(D, expected) and not R.any() and torch.equal(net(x, sigma, labels, alpha=0), expected)
    assert not torch.equal(edm(x, sigma, labels.roll(1, 0)), expected), 'the labels have no effect'
    if targets == 'residual':
        D, R = net.denoise_deblur(x, sigma, labels, alpha=0.5 * sigma)
        assert torch.equal(D, expected) and not R.any()


def test_without_blur_the_clean_image_is_not_touched():
    """Not even in its last bits, which show where it is nearly 0; images with blur in the same batch are blurred."""
    x, sigma, _ = batch()
    alpha = torch.zeros([len(x), 1, 1, 1])
    alpha[1:] = 0.5
    x[:, :, ::2] *= 1e-12
    net = warm_net(bnr='0,0.5', targets='clean')
    D, R = net.parametrisation.parts((x,), net.point(x, sigma, alpha))
    assert torch.equal(D[0], x[0]) and not R[0].any()
    torch.testing.assert_close(D[1:], blur(x[1:], alpha[1:]))


def test_transfer_from_edm_pickle(root):
    """EDM's own format, class-conditional, through the snapshot reader."""
    snapshot = read_snapshot(root / 'tests' / 'golden' / 'edm-network-snapshot-000123.pkl')
    edm = build_network(snapshot, SYSTEMS)
    net = WarmPrecond(**{**snapshot.network_kwargs, 'bnr': '0,0.5'}).eval()
    assert len(net.transfer(snapshot.state_dict)) == len(snapshot.state_dict)
    g = torch.Generator().manual_seed(5)
    x, labels = torch.randn([10, 3, 16, 16], generator=g), torch.eye(10)
    with torch.no_grad():
        assert torch.equal(net(x, 0.7, labels, alpha=0), edm(x, 0.7, labels))
        images = warm_sampler(net, x, labels, num_steps=3, path=ConstantBNR(0))
        assert torch.equal(images, edm_sampler(edm, x, labels, num_steps=3))


@pytest.mark.parametrize('kwargs', [SMALL, ADM], ids=['song', 'adm'])
@pytest.mark.parametrize('targets', TABLE_5)
def test_transfer_between_parametrisations(kwargs, targets):
    """Estimates of the same thing stay the same, those of another image take the first, and an unknown rest is 0."""
    x, sigma, _ = batch()
    for own in TABLE_5:
        source = seeded(WarmPrecond, perturb=True, **kwargs, targets=targets, bnr='0.5').eval()
        net = seeded(WarmPrecond, perturb=False, **kwargs, targets=own, bnr='0.5').eval()
        assert set(net.transfer(source.state_dict(), source.init_kwargs)) == set(net.state_dict())
        theirs = dict(zip(source.parametrisation.names, source.estimates(source.point(x, sigma))))
        for name, estimate in zip(net.parametrisation.names, net.estimates(net.point(x, sigma))):
            if name == REST and name not in theirs:
                assert not estimate.any()
            else:
                expected = theirs.get(name, next(iter(theirs.values())))
                torch.testing.assert_close(estimate, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('kwargs', [SMALL, ADM], ids=['song', 'adm'])
def test_transfer_from_warm_to_edm_takes_the_denoiser(kwargs):
    source = seeded(WarmPrecond, perturb=True, **kwargs, bnr='0,0.5').eval()
    edm = seeded(EDMPrecond, **kwargs).eval()
    assert set(edm.transfer(source.state_dict(), source.init_kwargs)) == set(edm.state_dict())
    x, sigma, _ = batch()
    torch.testing.assert_close(edm(x, sigma), source.denoise_deblur(x, sigma, alpha=0)[0], rtol=1e-5, atol=1e-6)


def test_transfer_from_a_narrower_network_copies_what_matches():
    """Only the output's tensors are cut into branches, and not into colours; what else has another shape is left."""
    grey = seeded(EDMPrecond, img_channels=1)
    assert not [name for name in seeded(EDMPrecond).transfer(grey.state_dict(), grey.init_kwargs) if 'aux_conv' in name]
    source = seeded(EDMPrecond).state_dict()
    net = seeded(WarmPrecond, model_channels=16)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    copied = net.transfer(source)
    for name, tensor in net.state_dict().items():
        same = name in source and source[name].shape == tensor.shape
        assert (name in copied) == (same or name == 'model.dec.8x8_aux_conv.bias')
        assert name in copied or name.startswith('map_blur') or torch.equal(tensor, before[name]), name


def test_transferred_network_learns_the_rest():
    """Training leaves the zeros that a transferred network starts from."""
    net = seeded(WarmPrecond, label_dim=3)
    net.transfer(seeded(EDMPrecond, label_dim=3).state_dict())
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    x, _, labels = batch(label_dim=3)
    for _ in range(2):
        optimizer.zero_grad()
        WarmLoss()(net, x, labels).mean().backward()
        optimizer.step()
    assert net.map_blur.linear.weight.any()
    assert net.denoise_deblur(x, torch.ones(4), labels)[1].any()


def test_sampling_path_of_the_paper_is_the_default():
    assert WarmPrecond(**SMALL).family.default == ConstantBNR(0.5) == parse_path()
    assert WarmPrecond(**SMALL, bnr_schedule='blurring').family.default == BlurringSchedule(20)


@pytest.mark.parametrize('alpha, said', [
    ([1, 2, 3], '3 blur levels for 2 images; give'), (torch.ones([3, 1, 1, 1]), '3 blur levels'), ([], '0 blur levels'),
    (-1, '-1.* is not a valid blur .*≥ 0'), ([1, -0.5], '≥ 0'), (float('nan'), '≥ 0'), (float('inf'), '≥ 0'),
])
@pytest.mark.parametrize('call', ['forward', 'denoise_deblur', 'point'])
def test_bad_blur(call, alpha, said):
    net = WarmPrecond(**SMALL)
    with pytest.raises(UserError, match=said):
        getattr(net, call)(torch.zeros(2, net.img_channels, net.img_resolution, net.img_resolution), [1.0, 2.0],
                           alpha=alpha)
