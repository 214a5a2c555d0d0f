"""Our own choices: defaults change nothing; each alternative changes what it names, or is refused."""

import copy
import dataclasses
import json

import pytest
import torch

from dnnlib import UserError
from tests.commands import SMALL as TRAIN
from tests.commands import invoke, refused
from tests.warm_examples import SMALL, Spy, batch, by_hand, family_of, images_of, outputs_of, point_of, seeded, warm_net
from torch_utils import training_stats
from training.loss import edm_loss_weight
from training.networks import EDMPrecond
from training.precond import edm_scalings
from training.progress import restore
from training.snapshot import build_network, read_snapshot, save_snapshot
from warm.blur import BLUR_RATES, blur, dct2, idct2, prior_spectrum, rest, rest_magnitude
from warm.choices import BLUR_EMBEDDINGS, BLUR_UNIT, DEFAULTS, REST, REST_LOSSES, REST_SCALES, checked_choices
from warm.loss import WarmLoss
from warm.oracle import GaussianOracle
from warm.precond import BlurEmbedding, WarmPrecond
from warm.samplers import warm_sampler
from warm.systems import SYSTEMS
from warm.targets import TARGETS

# Every value on offer but the defaults; 'none' goes with single paths only.
OTHERS = [dict(rest_weight=4.0), dict(rest_weight=0.25),
          *(dict(blur=name) for name in BLUR_RATES if name != DEFAULTS['blur']),
          *(dict(rest_scale=name) for name in REST_SCALES if name != DEFAULTS['rest_scale']),
          *(dict(rest_loss=name) for name in REST_LOSSES if name != DEFAULTS['rest_loss']),
          *(dict(blur_embedding=name) for name in BLUR_EMBEDDINGS if name != DEFAULTS['blur_embedding'])]
EVERY_OTHER = pytest.mark.parametrize('own', OTHERS, ids=lambda own: '-'.join(map(str, *own.items())))


def family_for(own):
    """A family with BNR 0 in it, where the choice allows."""
    return dict(bnr='0.5' if own.get('blur_embedding') == 'none' else '0,0.5')


# -- the defaults are what there was before the choices

def test_defaults_are_not_recorded():
    """Given or left out, defaults leave the headers of snapshots and states as they were before there was a choice."""
    kwargs = warm_net(**DEFAULTS).init_kwargs
    assert kwargs == warm_net().init_kwargs and not set(kwargs) & set(DEFAULTS)
    assert warm_net(rest_weight=1).init_kwargs == kwargs


def test_default_embedding_to_the_bit():
    torch.manual_seed(0)
    embed, alpha = BlurEmbedding(16), torch.tensor([0.0, 1e-6, 0.1, 113.0])
    expected = embed.linear(embed.features(alpha.clamp(min=torch.finfo(torch.float32).tiny).log() / 4))
    assert torch.equal(embed(alpha)[1:], expected[1:]) and not embed(alpha)[0].any()


def test_state_from_before_the_choices():
    """A state from before the choices resumes with the defaults; another choice is refused by name."""
    net = warm_net()
    optimizer = torch.optim.Adam(net.parameters())
    state = dict(net=net.state_dict(), ema=net.state_dict(), optimizer=optimizer.state_dict(),
                 network_kwargs=warm_net().init_kwargs)
    assert not set(state['network_kwargs']) & set(DEFAULTS)
    restore(state, 'x', net, copy.deepcopy(net), optimizer)
    other = warm_net(rest_weight=2.0)
    with pytest.raises(UserError, match='rest_weight was not set there and is 2.0 here'):
        restore(state, 'x', other, copy.deepcopy(other), optimizer)


# -- each changes what it names

@pytest.mark.parametrize('family', ['0.5', '0,0.5,2', '0.1-2', 'blurring'])
@pytest.mark.parametrize('weight', [4.0, 0.25])
def test_rest_weight_multiplies_the_rest_alone(weight, family):
    images = images_of()
    training_stats.Collector().update()
    collector, net = training_stats.Collector(), Spy(family)
    torch.manual_seed(7)
    loss = WarmLoss(rest_weight=weight)(net, images)
    torch.manual_seed(7)
    sigma, alpha, y, _, _ = by_hand(family, images)
    D, R = (edm_loss_weight(sigma) * part ** 2 for part in (blur(y, alpha), rest(y, alpha)))
    torch.testing.assert_close(loss, D + weight * R, rtol=1e-3, atol=1e-5)
    collector.update()
    reported = collector.as_dict()  # without the weight
    assert reported['Loss/denoise']['mean'] == pytest.approx(D.mean().item(), rel=1e-4)
    assert reported['Loss/deblur']['mean'] == pytest.approx(R.mean().item(), rel=1e-4)


@pytest.mark.parametrize('family', ['0.5', '0,0.5,2', 'blurring'])
def test_rest_loss_of_unit_weight(family):
    """R's squared error is weighted by 1/s_R(α)², by nothing where there is no blur; reported with D's weight."""
    images = images_of()
    training_stats.Collector().update()
    collector, net = training_stats.Collector(), Spy(family)
    torch.manual_seed(7)
    loss = WarmLoss(rest_loss='unit', rest_weight=3.0)(net, images)
    torch.manual_seed(7)
    sigma, alpha, y, _, _ = by_hand(family, images)
    D, R = blur(y, alpha) ** 2, rest(y, alpha) ** 2
    weight = torch.where(alpha > 0, rest_magnitude(alpha, 8) ** -2, 0)
    torch.testing.assert_close(loss, (edm_loss_weight(sigma) * D + 3 * weight * R).float(), rtol=1e-3, atol=1e-5)
    collector.update()
    reported = collector.as_dict()
    assert reported['Loss/deblur']['mean'] == pytest.approx((edm_loss_weight(sigma) * R).mean().item(), rel=1e-4)


@pytest.mark.parametrize('scale', REST_SCALES)
def test_unit_weights(scale):
    """1/s² for every scale; EDM's is λ(β) itself, so this choice is refused. 0 where 1/s² would be infinite."""
    beta = torch.tensor([1e-3, 0.3, 80.0, 0.3, 1e-3]).reshape(-1, 1, 1, 1)
    alpha = beta * torch.tensor([0.5, 0.5, 0.5, 0, 1e-9]).reshape(-1, 1, 1, 1)
    point = dataclasses.replace(point_of(torch.zeros([5, 3, 8, 8]), beta, alpha), rest_scale=scale)
    weight = REST_LOSSES['unit'](edm_loss_weight(beta), point)
    assert torch.isfinite(weight).all() and weight[3] == 0 and weight.dtype == torch.float32
    s = REST_SCALES[scale].scale(point).float()
    torch.testing.assert_close(weight[:3] * s[:3] ** 2, torch.ones([3, 1, 1, 1]))
    if scale == 'edm':
        torch.testing.assert_close(weight[:3], edm_loss_weight(beta)[:3])
        with pytest.raises(UserError, match='--rest-loss=unit has no effect with --rest-scale=edm'):
            warm_net(rest_scale='edm', rest_loss='unit')


def test_the_system_hands_the_weights_to_the_loss():
    assert SYSTEMS['warm'].loss(warm_net(rest_weight=3.0)).rest_weight == 3.0
    assert SYSTEMS['warm'].loss(warm_net()).rest_weight == 1.0
    assert SYSTEMS['warm'].loss(warm_net(rest_loss='unit')).rest_loss == 'unit'
    assert SYSTEMS['warm'].loss(warm_net()).rest_loss == 'edm'


def test_rest_scales_by_definition():
    """EDM's c_out(β) = 0.5·β/√(β² + 0.25), the constant 0.5, the prior's s_R(α); 0 where there is no blur."""
    beta = torch.tensor([0.0012, 0.3, 4.0, 80.0]).reshape(-1, 1, 1, 1)
    alpha = 0.5 * beta * torch.tensor([1, 0, 1, 1]).reshape(-1, 1, 1, 1)
    point = point_of(torch.zeros([4, 3, 32, 32]), beta, alpha)
    scale = {name: REST_SCALES[name].scale(point).double().flatten() for name in ('edm', 'unit', 'prior')}
    edm = torch.tensor([0.0012 / 2 / (0.0012 ** 2 + 0.25) ** 0.5, 0, 2 / 16.25 ** 0.5, 40 / 6400.25 ** 0.5]).double()
    torch.testing.assert_close(scale['edm'], edm, rtol=1e-6, atol=0)
    assert scale['unit'].tolist() == [0.5, 0, 0.5, 0.5]
    assert torch.equal(scale['prior'], rest_magnitude(alpha, 32).flatten())
    assert scale['prior'][0] < 2e-6 and 0.43 < scale['prior'][3] < 0.45


@pytest.mark.parametrize('name', ['prior', 'edm', 'unit'])
def test_rest_scale_scales_the_rest(name):
    """R is s·F_R minus its mean; D is the same with every scale."""
    net, default = warm_net(rest_scale=name), warm_net()
    x, sigma, _ = batch()
    alpha = 0.5 * sigma
    _, F_R = outputs_of(net, x, sigma, alpha)
    c_out = edm_scalings(sigma)[1]
    scale = {'edm': c_out, 'unit': torch.full([4], 0.5), 'prior': rest_magnitude(alpha, 8).float().flatten()}[name]
    D, R = net.denoise_deblur(x, sigma, alpha=alpha)
    expected = scale.reshape(-1, 1, 1, 1) * F_R
    torch.testing.assert_close(R, expected - expected.mean((2, 3), keepdim=True))
    assert torch.equal(D, default.denoise_deblur(x, sigma, alpha=alpha)[0])
    assert torch.equal(R, default.denoise_deblur(x, sigma, alpha=alpha)[1]) == (name == 'prior')


def test_wiener_rest_by_definition():
    """R = V (1−M)·M S/(M²S + β²) Vᵀx + √mean((1−M)² S β²/(M²S + β²))·F_R, minus its mean; S is the prior."""
    net = warm_net(rest_scale='wiener')
    x, sigma, _ = batch()
    alpha = 0.5 * sigma
    _, F_R = outputs_of(net, x, sigma, alpha)
    k = torch.arange(8, dtype=torch.float64)
    S = (k[:, None] ** 2 + k ** 2 + 1) ** -1.2
    S *= 0.25 / S.mean()
    for i in range(len(x)):
        M = torch.exp(-(torch.pi / 8) ** 2 * (k[:, None] ** 2 + k ** 2) * alpha[i].double() ** 2 / 2)
        total = M ** 2 * S + sigma[i].double() ** 2
        skip = idct2((1 - M) * M * S / total * dct2(x[i]))
        scale = ((1 - M) ** 2 * S * sigma[i].double() ** 2 / total).mean().sqrt()
        expected = skip + scale * F_R[i]
        _, R = net.denoise_deblur(x[i:i + 1], sigma[i:i + 1], alpha=alpha[i:i + 1])
        torch.testing.assert_close(R[0].double(), expected - expected.mean((1, 2), keepdim=True), rtol=1e-4, atol=1e-6)


def test_wiener_rest_is_the_best_linear_one():
    """For Gaussian images with the prior's spectrum, its skip is E[R|x], and its scale this estimate's error."""
    S, g = prior_spectrum(8), torch.Generator().manual_seed(0)
    images, noise = (idct2(s * torch.randn([4000, 1, 8, 8], generator=g, dtype=torch.float64)) for s in (S.sqrt(), 1))
    for beta in (0.05, 1.0):
        x = blur(images, beta / 2) + beta * noise
        point = point_of(x, *(torch.full([1, 1, 1, 1], v, dtype=torch.float64) for v in (beta, beta / 2)))
        kind, target = REST_SCALES['wiener'], rest(images, beta / 2)
        _, R = GaussianOracle(S).denoise_deblur(x, beta, alpha=beta / 2)
        torch.testing.assert_close(kind.skip(point), R)
        assert (target - R).square().mean().sqrt().item() == pytest.approx(kind.scale(point).item(), rel=0.02)
        assert kind.scale(point) < REST_SCALES['prior'].scale(point)


@pytest.mark.parametrize('beta, explained, weight', [(0.01, 0.99, 1e-6), (0.1, 0.64, 1e-4), (0.5, 0.07, 0.006),
                                                     (1, 0.02, 0.03)])
def test_numbers_of_the_docstring(beta, explained, weight):
    """The share of R's power that the filter knows, and the weight λ·s_R² of F_R's errors: BNR 0.5, N = 32."""
    at = torch.zeros([1, 3, 32, 32]), *(torch.full([1, 1, 1, 1], v, dtype=torch.float64) for v in (beta, beta / 2))
    prior, wiener = (REST_SCALES[name].scale(point_of(*at)).item() for name in ('prior', 'wiener'))
    assert 1 - (wiener / prior) ** 2 == pytest.approx(explained, abs=0.005)
    assert edm_loss_weight(torch.tensor(beta)).item() * prior ** 2 == pytest.approx(weight, rel=0.5)


def test_linear_embedding_is_of_the_blur_itself():
    """It is made of cos and sin of α/BLUR_UNIT times the frequencies 1 … 1/10000, and is zero without blur."""
    torch.manual_seed(0)
    embed = BlurEmbedding(16, BLUR_EMBEDDINGS['linear'])
    alpha = torch.tensor([0.0, 0.01, 0.15, 5.0, 113.0])
    phase = (alpha / BLUR_UNIT)[:, None] * 1e-4 ** (torch.arange(8) / 7)
    features = torch.cat([phase.sin(), phase.cos()], dim=1)
    torch.testing.assert_close(embed(alpha)[1:], (features @ embed.linear.weight.T)[1:], rtol=1e-4, atol=1e-5)
    assert not embed(alpha)[0].any()
    told = BLUR_EMBEDDINGS['linear']
    torch.testing.assert_close(told(alpha * 3), 3 * told(alpha))


def test_network_is_told_in_the_chosen_way():
    x, sigma, _ = batch()
    net = warm_net(blur_embedding='linear')
    F = outputs_of(net, x, sigma, 0.5 * sigma)
    assert net.map_blur.feature is BLUR_EMBEDDINGS['linear']
    c_skip, c_out, _, _ = edm_scalings(sigma.reshape(-1, 1, 1, 1))
    torch.testing.assert_close(net.denoise_deblur(x, sigma)[0], c_skip * x + c_out * F[0])
    assert not torch.equal(net(x, sigma), warm_net()(x, sigma))


@pytest.mark.parametrize('kwargs', [dict(), dict(bnr='0.3'), dict(bnr_schedule='blurring')], ids=str)
def test_network_that_is_not_told(kwargs):
    """Without an embedding there are no tensors for one; D does not depend on α, and R only through its scale."""
    net, told = warm_net(blur_embedding='none', **kwargs), warm_net(**kwargs)
    assert net.map_blur is None and set(told.state_dict()) - set(net.state_dict()) == {'map_blur.linear.weight'}
    x, sigma, _ = batch()
    D, R = net.denoise_deblur(x, sigma, alpha=0.5)
    D_other, R_other = net.denoise_deblur(x, sigma, alpha=2.0)
    assert torch.equal(D, D_other) and not torch.equal(told.denoise_deblur(x, sigma, alpha=0.5)[0],
                                                       told.denoise_deblur(x, sigma, alpha=2.0)[0])
    torch.testing.assert_close(R / rest_magnitude(0.5, 8).float(), R_other / rest_magnitude(2.0, 8).float())


# -- laws that hold with every choice

@EVERY_OTHER
def test_rest_is_mean_free_and_0_without_blur(own):
    net = warm_net(**family_for(own), **own)
    x, sigma, _ = batch()
    D, R = net.denoise_deblur(x, sigma, alpha=torch.tensor([0.0, 0.5, 0.0, 3.0]))
    assert R[1].any() and R[3].any() and not R[[0, 2]].any()
    assert R.mean((2, 3)).abs().max() < 1e-6 * max(1, R.abs().max())
    assert torch.equal(D[[0, 2]], net(x, sigma, alpha=torch.tensor([0.0, 0.5, 0.0, 3.0]))[[0, 2]])


@EVERY_OTHER
@pytest.mark.parametrize('family', [dict(bnr='0.5'), None], ids=['single', 'several'])
def test_transfer_at_bnr_0_is_edm(own, family):
    """After a transfer, D equals EDM's bit for bit and R is 0, at any blur, but for what its scale adds to F_R."""
    edm = seeded(EDMPrecond, label_dim=3).eval()
    net = seeded(WarmPrecond, label_dim=3, **(family or family_for(own)), **own).eval()
    assert set(net.transfer(edm.state_dict())) >= set(edm.state_dict())
    x, sigma, labels = batch(label_dim=3)
    expected = edm(x, sigma, labels)
    for alpha in (0, 0.5 * sigma):
        D, R = net.denoise_deblur(x, sigma, labels, alpha=alpha)
        skip = torch.as_tensor(REST_SCALES[net.rest_scale].skip(net.point(x, sigma, alpha)))
        assert torch.equal(D, expected) and (torch.equal(R, skip - skip.mean((2, 3), keepdim=True)) if skip.any()
                                             else not R.any())


@EVERY_OTHER
def test_every_parameter_learns(own):
    """With every choice, the loss is finite and every parameter gets a gradient."""
    net = seeded(WarmPrecond, **family_for(own), **own).train()
    x, _, _ = batch(8)
    loss = SYSTEMS['warm'].make_loss(net)(net, x)
    assert loss.shape == x.shape and torch.isfinite(loss).all()
    loss.mean().backward()
    assert all(p.grad is not None and p.grad.any() and torch.isfinite(p.grad).all() for p in net.parameters())


@EVERY_OTHER
def test_snapshot_round_trip(own, tmp_path):
    """The file records the choice, its network draws the same images, and the facts beside scores name the choice."""
    net = warm_net(**family_for(own), **own)
    save_snapshot(tmp_path / 'network.safetensors', net, 'warm', kimg=1)
    snapshot = read_snapshot(tmp_path / 'network.safetensors')
    twin = build_network(snapshot, SYSTEMS)
    assert {name: snapshot.network_kwargs[name] for name in own} == own == twin.choices
    assert twin.init_kwargs == net.init_kwargs == json.loads(json.dumps(net.init_kwargs))
    z = batch(2)[0]
    with torch.no_grad():
        assert torch.equal(warm_sampler(net, z, num_steps=3), warm_sampler(twin, z, num_steps=3))
    (name, value), = own.items()
    shown = f'{value:g}' if isinstance(value, float) else value
    assert SYSTEMS['warm'].describe(twin, {})['targets'] == f"residual --{name.replace('_', '-')}={shown}"


def test_facts_of_the_defaults_are_as_before():
    assert SYSTEMS['warm'].describe(warm_net(), {}) == dict(
        bnr=0.5, path='constant BNR 0.5', trained_on='constant BNR 0.5', targets='residual')


# -- refusals

@pytest.mark.parametrize('own', [
    *(dict(bnr='0', **own) for own in OTHERS),
    *(dict(targets=name, **own) for name in TARGETS if REST not in TARGETS[name].names
      for own in (dict(rest_weight=2.0), dict(rest_scale='edm'), dict(rest_loss='unit'))),
    dict(bnr='0,0.5', blur_embedding='none'), dict(bnr='0.1-2', blur_embedding='none'),
    *(dict(rest_weight=w) for w in (0.0, -1.0, float('nan'), float('inf'))),
    dict(rest_scale='huge'), dict(rest_loss='none'), dict(blur_embedding='cubic')], ids=str)
def test_refused_in_a_sentence(own):
    with pytest.raises(UserError) as e:
        WarmPrecond(**SMALL, **own)
    sentence = str(e.value)
    name = next(name for name in own if name in DEFAULTS)
    assert '\n' not in sentence and (name in sentence or f"--{name.replace('_', '-')}=" in sentence)


@pytest.mark.parametrize('targets', TARGETS)
def test_blur_embedding_goes_with_all_targets(targets):
    for name in BLUR_EMBEDDINGS:
        net = warm_net(targets=targets, blur_embedding=name)
        assert torch.isfinite(net(*batch()[:2])).all()


def test_defaults_go_with_everything():
    """Defaults given explicitly are no choice, so they are accepted even where a choice would be refused."""
    for kwargs in (dict(bnr='0'), dict(targets='clean'), dict(bnr='0.1-2')):
        assert not WarmPrecond(**SMALL, **kwargs, **DEFAULTS).choices
    assert checked_choices(DEFAULTS, family_of('0'), 'residual', ('denoise',)) == {}


# -- the command line

@EVERY_OTHER
def test_flags(own):
    """Each flag reaches the saved options, is refused for another system, and stands in the help text."""
    (name, value), = own.items()
    flag = f"--{name.replace('_', '-')}={value}"
    out = invoke('train.py', '-n', '--precond=warm', flag)
    assert out.exit_code == 0 and f'"{name}": {json.dumps(value)}' in out.output, out.output
    refused(invoke('train.py', '-n', '--precond=edm', flag), flag.split('=')[0], '--precond=edm')
    help_text = invoke('train.py', '--help').output
    assert flag.split('=')[0] in help_text


def test_flags_that_exclude_each_other():
    refused(invoke('train.py', '-n', '--precond=warm', '--targets=clean', '--rest-weight=2'), '--targets=clean')
    refused(invoke('train.py', '-n', '--precond=warm', '--bnr=0', '--rest-scale=unit'), 'BNR 0')
    refused(invoke('train.py', '-n', '--precond=warm', '--bnr=0.1-2', '--blur-embedding=none'), 'BNRs from 0.1 to 2')
    refused(invoke('train.py', '-n', '--precond=warm', '--rest-weight=0'), '--rest-weight=0')


def test_train_and_generate(tmp_path):
    """All three choices work together, from training to images."""
    flags = ['--rest-weight=2', '--rest-scale=edm', '--blur-embedding=none']
    out = invoke('train.py', *TRAIN, f'--outdir={tmp_path / "run"}', '--nosubdir', '--precond=warm',
                 '--duration=0.000032', '--seed=0', *flags)
    assert out.exit_code == 0, out.output
    network = max((tmp_path / 'run').glob('network-snapshot-*.safetensors'))
    assert read_snapshot(network).network_kwargs['rest_weight'] == 2
    out = invoke('generate.py', f'--network={network}', f'--outdir={tmp_path / "out"}', '--seeds=0-1', '--steps=3')
    assert out.exit_code == 0 and len(list((tmp_path / 'out').glob('*.png'))) == 2, out.output
