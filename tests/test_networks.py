"""Networks: equal to the recorded ones, and laws that hold for any weights."""

import itertools
import json
import math
import re
import types

import pytest
import torch

from dnnlib import UserError
from tests.commands import invoke, refused
from torch_utils.precision import PRECISIONS
from training import architecture, networks
from training.acceleration import accelerate
from training.architecture import Network
from training.generation import BATCH, default_batch
from training.layers import (INIT_MODES, Conv2d, FourierEmbedding, GroupNorm, Init, Linear, PositionalEmbedding,
                             attend, draw_parameters, filter_down, filter_up, make_resample_filter, plain_attention,
                             split_heads)
from training.precond import Precond, edm_scalings
from training.schedules import vp_sigma, vp_sigma_inv
from training.unet import ARCHITECTURES, DECODERS, EMBEDDINGS, ENCODERS, MODELS, UNet

RECORDS = ['net-edm-adm', 'net-edm-ddpmpp', 'net-edm-ncsnpp', 'net-edm-skip', 'net-iddpm-ddpmpp', 'net-ve-ncsnpp',
           'net-vp-ddpmpp']
LAYOUTS = ['cifar10-ddpmpp', 'cifar10-ncsnpp', 'ffhq-ddpmpp', 'imagenet-adm']
PRECONDS = {c.__name__: c for c in (networks.VPPrecond, networks.VEPrecond, networks.iDDPMPrecond,
                                    networks.EDMPrecond)}


class Patches(Network):
    """A user's own network with the bare interface and no more: patches of 4×4 pixels that see their neighbours."""

    def __init__(self, img_resolution, in_channels, out_channels, label_dim=0, augment_dim=0, dropout=0.1, width=16):
        super().__init__(img_resolution, in_channels, out_channels, noise_channels=width)
        init = Init('xavier_uniform')
        self.dropout, self.embed_noise = dropout, PositionalEmbedding(width, endpoint=True, sin_first=True)
        self.embed_label = Linear(label_dim, width, init) if label_dim else None
        self.embed_augment = Linear(augment_dim, width, init) if augment_dim else None
        self.enter, self.mix = Conv2d(in_channels * 16, width, 1, init), Conv2d(width, width, 3, init)
        self.leave = Conv2d(width, out_channels * 16, 1, init)

    def forward(self, x, noise_labels, class_labels=None, augment_labels=None, extra_embedding=None):
        emb = self.embed_noise(noise_labels)
        for layer, labels in ((self.embed_label, class_labels), (self.embed_augment, augment_labels)):
            emb = emb + layer(labels) if layer is not None and labels is not None else emb
        emb = emb if extra_embedding is None else emb + extra_embedding
        h = self.enter(torch.nn.functional.pixel_unshuffle(x, 4)) + emb.to(x.dtype)[:, :, None, None]
        h = h + torch.nn.functional.dropout(self.mix(h.sin()), self.dropout, self.training)
        return torch.nn.functional.pixel_shuffle(self.leave(h), 4)


NETWORKS = {**MODELS, 'Patches': Patches}  # whatever is registered is tested
UNETS = [name for name, network in NETWORKS.items() if issubclass(network, UNet)]
SMALL = {name: dict(model_type=name, **network.small) for name, network in NETWORKS.items()}


@pytest.fixture(autouse=True)
def two_lines(monkeypatch):
    """The two lines that register a network."""
    monkeypatch.setitem(MODELS, 'Patches', Patches)
    monkeypatch.setitem(ARCHITECTURES, 'patches', dict(model_type='Patches', width=24))


def small_net(model_type='SongUNet', precond='EDMPrecond', label_dim=3, **kwargs):
    """An 8×8 network in evaluation mode whose weights are all away from their (often zero) start."""
    torch.manual_seed(0)
    net = PRECONDS[precond](img_resolution=8, img_channels=3, label_dim=label_dim, **{**SMALL[model_type], **kwargs})
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return net.eval()


def batch_of(n=4, label_dim=3):
    g = torch.Generator().manual_seed(1)
    x = torch.randn([n, 3, 8, 8], generator=g)
    sigma = torch.linspace(-2, 2, n).exp()
    labels = torch.eye(label_dim)[torch.arange(n) % label_dim]
    return x, sigma, labels


def assert_close(actual, expected, rel=1e-5):
    """Assert that no difference exceeds `rel` times the largest expected value."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert (actual - expected).abs().max() <= rel * expected.abs().max()


# -- records

def load_record(golden, name):
    record = golden(name)
    net = getattr(networks, record.meta['precond'])(**record.meta['kwargs']).eval()
    arrays = {k: torch.from_numpy(v) for k, v in record.arrays.items()}
    state = {k.removeprefix('sd/'): v for k, v in arrays.items() if k.startswith('sd/')}
    return record.meta, net, arrays, state


@pytest.mark.parametrize('name', RECORDS)
def test_equals_recorded_network(golden, name):
    meta, net, arrays, state = load_record(golden, name)
    assert list(net.state_dict()) == list(state)
    if 'u' in state:  # computed in float32 throughout
        assert torch.equal(net.u, state['u'])
    net.load_state_dict(state)
    assert sum(p.numel() for p in net.parameters()) == meta['params']

    inputs = arrays['x'], arrays['sigma'], arrays['labels']
    out = net(*inputs)
    out_aug = net(*inputs, augment_labels=arrays['augment_labels'])
    for actual, expected in ((out.detach(), arrays['out']), (out_aug.detach(), arrays['out_aug'])):
        for actual_image, expected_image in zip(actual, expected):
            assert_close(actual_image, expected_image)

    out.square().mean().backward()
    norms = {k: float(p.grad.norm()) for k, p in net.named_parameters() if p.grad is not None}
    assert norms == pytest.approx(meta['grad_norm'], rel=1e-5)


@pytest.mark.parametrize('name', LAYOUTS)
def test_layout_of_published_networks(root, name):
    layout = json.loads((root / 'tests' / 'golden' / 'layouts.json').read_text())[name]
    with torch.device('meta'):
        net = getattr(networks, layout['precond'])(**layout['kwargs'])
    assert {k: list(v.shape) for k, v in net.state_dict().items()} == layout['tensors']
    assert list(net.state_dict()) == list(layout['tensors'])
    assert sum(p.numel() for p in net.parameters()) == layout['params']


def test_every_recorded_file_is_read(root):
    """Each is opened as golden('NAME'), stands in a list RECORDS, or is named in full."""
    source = '\n'.join(path.read_text() for path in (root / 'tests').glob('test_*.py'))
    listed = ''.join(re.findall(r'^RECORDS = \[.*?\]', source, re.DOTALL | re.MULTILINE))
    for path in (root / 'tests' / 'golden').iterdir():
        assert f"golden('{path.stem}')" in source or f"'{path.stem}'" in listed or path.name in source, path.name


# -- layers

@pytest.mark.parametrize('mode', INIT_MODES)
@pytest.mark.parametrize('shape', [(40, 90), (24, 30, 3, 3)])
def test_init_statistics(mode, shape):
    area = math.prod(shape[2:])
    fan_out, fan_in = shape[0] * area, shape[1] * area
    variance = 2 / (fan_in + fan_out) if 'xavier' in mode else 1 / fan_in
    torch.manual_seed(0)
    weight, bias = draw_parameters(shape, Init(mode, weight=0.5, bias=2.0))
    assert weight.mean().abs() < 0.5 * math.sqrt(variance) * 4 / math.sqrt(weight.numel())
    assert weight.var().item() == pytest.approx(0.25 * variance, rel=0.1)
    assert bias.var().item() == pytest.approx(4 * variance, rel=0.7)
    if 'uniform' in mode:
        assert 0.99 < weight.abs().max() / (0.5 * math.sqrt(3 * variance)) <= 1


@pytest.mark.parametrize('mode', INIT_MODES)
def test_weight_is_drawn_before_bias(mode):
    torch.manual_seed(0)
    weight, bias = draw_parameters([4, 6], Init(mode, bias=1.0))
    torch.manual_seed(0)
    weight_alone, none = draw_parameters([4, 6], Init(mode), bias=False)
    assert torch.equal(weight, weight_alone) and none is None
    assert bias.shape == (4,) and bias.std() > 0


# Pattern of a parameter's name → gain of its weight and of its bias; other layers have those of ''.
GAINS = {
    'SongUNet': {'conv1|proj|aux_conv': (1e-5, 0), 'qkv': (math.sqrt(0.2), 0), '': (1, 0)},
    'DhariwalUNet': {'conv1|proj|out_conv|map_augment': (0, 0), '': (math.sqrt(1 / 3), math.sqrt(1 / 3))}}


@pytest.mark.parametrize('model_type, kwargs', [
    ('SongUNet', dict(encoder_type='skip', decoder_type='skip')), ('SongUNet', dict(encoder_type='residual')),
    ('DhariwalUNet', dict(channel_mult=[4, 8]))])
@torch.no_grad()
def test_every_parameter_starts_within_its_range(model_type, kwargs):
    """Weights and biases are uniform: n of them have a maximum below q·range with probability q^n, here 1e-6."""
    torch.manual_seed(0)
    net = MODELS[model_type](8, 3, 3, **{**MODELS[model_type].small, **kwargs}, label_dim=10, augment_dim=9)
    for name, p in net.named_parameters():
        layer, kind = name.rsplit('.', 1)
        if 'norm' in layer:
            assert (p == (kind == 'weight')).all(), name
        elif model_type == 'DhariwalUNet' and layer == 'map_label':  # normal, of variance label_dim/fan_in
            assert p.std() == pytest.approx(1, rel=0.1) and p.abs().max() > 2.5
        else:
            weight = net.get_parameter(f'{layer}.weight')
            fan_out, fan_in = (n * math.prod(weight.shape[2:]) for n in weight.shape[:2])
            gains = next(gains for pattern, gains in GAINS[model_type].items() if re.search(pattern, layer))
            variance = 2 / (fan_in + fan_out) if model_type == 'SongUNet' else 1 / fan_in
            bound = gains[kind == 'bias'] * math.sqrt(3 * variance)
            assert bound * 1e-6 ** (1 / p.numel()) <= p.abs().max() <= bound * (1 + 1e-6), name


@pytest.mark.parametrize('taps', [(1, 1), (1, 3, 3, 1)])
def test_resampling(taps):
    f = make_resample_filter(taps)
    pad = (len(taps) - 1) // 2
    flat = torch.ones([1, 2, 8, 8])
    assert torch.allclose(filter_down(flat, f, pad)[..., 1:-1, 1:-1], torch.ones([1, 2, 2, 2]))
    assert torch.allclose(filter_up(flat, f, pad)[..., 2:-2, 2:-2], torch.ones([1, 2, 12, 12]))
    # Up is four times the adjoint of down.
    x, y = torch.randn([1, 2, 8, 8]), torch.randn([1, 2, 4, 4])
    assert torch.allclose((filter_down(x, f, pad) * y).sum() * 4, (x * filter_up(y, f, pad)).sum(), atol=1e-4)


@pytest.mark.parametrize('taps', [(1, 1), (1, 3, 3, 1)])
@pytest.mark.parametrize('direction', ['up', 'down'])
def test_fused_resampling(taps, direction):
    torch.manual_seed(0)
    kwargs = {'init': Init('kaiming_normal', bias=1.0), direction: True, 'resample_filter': taps}
    fused = Conv2d(2, 5, 3, fused_resample=True, **kwargs)
    apart = Conv2d(2, 5, 3, **kwargs)
    apart.load_state_dict(fused.state_dict())
    x = torch.randn([1, 2, 16, 16])
    if direction == 'up':
        # Upsampling, both filter first, so they may differ only at the border, where the paddings do.
        assert fused(x).shape == apart(x).shape == (1, 5, 32, 32)
        assert torch.allclose(fused(x)[..., 4:-4, 4:-4], apart(x)[..., 4:-4, 4:-4], atol=1e-5)
        # The fused layer convolves the whole enlarged image, of which the other crops the border first.
        pad = (len(taps) - 1) // 2
        kernel = (fused.resample_filter * 4).repeat(2, 1, 1, 1)
        whole = torch.nn.functional.conv_transpose2d(x, kernel, stride=2, groups=2)
        expected = torch.nn.functional.conv2d(whole, fused.weight, fused.bias, padding=1)
        assert torch.allclose(fused(x), expected[..., pad:pad + 32, pad:pad + 32], atol=1e-5)
    else:
        # Downsampling, the fused layer is a plain convolution at full resolution, then the filter.
        plain = Conv2d(2, 5, 3, init=kwargs['init'])
        plain.load_state_dict({'weight': fused.weight, 'bias': fused.bias})
        expected = filter_down(plain(x), fused.resample_filter, (len(taps) - 1) // 2)
        assert fused(x).shape == apart(x).shape == expected.shape == (1, 5, 8, 8)
        assert torch.allclose(fused(x)[..., 2:-2, 2:-2], expected[..., 2:-2, 2:-2], atol=1e-5)


@pytest.mark.parametrize('heads, dtype, rel', [(1, torch.float32, 1e-5), (4, torch.float32, 1e-5),
                                               (4, torch.float64, 1e-12), (2, torch.float16, 5e-3)])
def test_fused_attention_equals_plain(heads, dtype, rel):
    g = torch.Generator().manual_seed(0)
    qkv = (torch.randn([2, 3 * 32, 5, 6], generator=g) * 2).to(dtype).requires_grad_()
    weight = torch.randn([2, 32, 5, 6], generator=g).to(dtype)
    fast = attend(qkv, heads)
    plain = plain_attention(*split_heads(qkv, heads)).transpose(-1, -2).reshape(2, 32, 5, 6)
    assert_close(fast, plain, rel)
    grads = [torch.autograd.grad((out * weight).sum(), qkv)[0] for out in (fast, plain)]
    assert_close(*grads, 2 * rel)


def test_plain_attention_by_hand():
    """Attention follows its definition, with channels ordered by head, then channel, then query/key/value."""
    qkv = torch.randn([1, 3 * 4, 2, 1])
    out = torch.zeros([1, 4, 2, 1])
    for head in range(2):
        q, k, v = (torch.stack([qkv[0, (head * 2 + c) * 3 + i, :, 0] for c in range(2)]) for i in range(3))
        for pixel in range(2):
            w = (q[:, pixel] @ k / math.sqrt(2)).softmax(dim=0)
            out[0, head * 2:head * 2 + 2, pixel, 0] = v @ w
    assert torch.allclose(attend(qkv, 2), out, atol=1e-6)


def test_embeddings():
    x = torch.tensor([0.0, 0.7, 900.0])
    song = PositionalEmbedding(8, endpoint=True, sin_first=True)(x)
    freqs = torch.tensor([1, 10000 ** (-1 / 3), 10000 ** (-2 / 3), 1e-4])
    assert torch.allclose(song, torch.cat([(x[:, None] * freqs).sin(), (x[:, None] * freqs).cos()], 1), atol=1e-4)
    adm = PositionalEmbedding(8, endpoint=False, sin_first=False)(x)
    freqs = torch.tensor([1, 1e-1, 1e-2, 1e-3])
    assert torch.allclose(adm, torch.cat([(x[:, None] * freqs).cos(), (x[:, None] * freqs).sin()], 1), atol=1e-4)
    torch.manual_seed(0)
    fourier = FourierEmbedding(2000)
    torch.manual_seed(0)
    assert torch.equal(fourier.freqs, 16 * torch.randn(1000))
    assert torch.allclose(fourier(x[:2]).square().sum(1), torch.tensor([1000.0, 1000.0]))


# -- whole networks

@pytest.mark.parametrize('embedding, encoder, decoder', list(itertools.product(EMBEDDINGS, ENCODERS, DECODERS)))
def test_every_song_variant_runs_and_learns(embedding, encoder, decoder):
    net = small_net(embedding_type=embedding, encoder_type=encoder, decoder_type=decoder, channel_mult=[1, 2, 2],
                    resample_filter=[1, 3, 3, 1])
    x, sigma, labels = batch_of()
    out = net(x, sigma, labels)
    assert out.shape == x.shape and out.isfinite().all()
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())


@pytest.mark.parametrize('model_type, precond', list(itertools.product(NETWORKS, PRECONDS)))
class TestAnyNetwork:
    """Laws of every network under every preconditioning."""

    def test_images_do_not_see_each_other(self, model_type, precond):
        net = small_net(model_type, precond)
        x, sigma, labels = batch_of()
        whole = net(x, sigma, labels)
        for i in range(len(x)):
            assert_close(net(x[i:i + 1], sigma[i], labels[i:i + 1]), whole[i:i + 1])

    def test_rebuilt_from_init_kwargs(self, model_type, precond):
        net = small_net(model_type, precond, augment_dim=9)
        again = type(net)(**json.loads(json.dumps(net.init_kwargs))).eval()
        again.load_state_dict(net.state_dict())
        assert again.init_kwargs == net.init_kwargs
        assert (again.sigma_min, again.sigma_max) == (net.sigma_min, net.sigma_max)
        inputs = batch_of()
        assert torch.equal(again(*inputs), net(*inputs))

    def test_contract(self, model_type, precond):
        net = small_net(model_type, precond, label_dim=0, use_fp16=True)
        assert isinstance(net, Precond) and isinstance(net.model, MODELS[model_type])
        assert (net.img_resolution, net.img_channels, net.label_dim, net.use_fp16) == (8, 3, 0, True)
        assert 0 <= net.sigma_min < net.sigma_max
        x, sigma, _ = batch_of()
        out = net(x.double(), sigma.double())
        assert out.dtype == torch.float32 and out.shape == x.shape
        assert torch.equal(out, net(x, sigma.reshape(-1, 1, 1, 1), torch.zeros([4, 0]), force_fp32=True))
        assert_close(net(x, 0.7), net(x, torch.full([4], 0.7)))
        assert net.round_sigma(sigma).shape == sigma.shape

    def test_missing_labels_are_zeros(self, model_type, precond):
        net = small_net(model_type, precond)
        x, sigma, labels = batch_of()
        assert_close(net(x, sigma), net(x, sigma, torch.zeros_like(labels)), rel=1e-6)
        assert torch.equal(net(x, sigma, labels[0]), net(x, sigma, labels[:1]))
        assert (net(x, sigma) - net(x, sigma, labels)).abs().max() > 1e-4


@pytest.mark.parametrize('model_type', NETWORKS)
class TestAnyArchitecture:

    def test_is_small_and_says_what_it_takes(self, model_type):
        net = small_net(model_type)
        assert isinstance(net.model, Network) and sum(p.numel() for p in net.parameters()) <= 1_000_000
        assert (net.model.img_resolution, net.model.in_channels, net.model.out_channels) == (8, 3, 3)
        for flag, argument in net.model.size_arguments.items():
            value = {'cbase': 32, 'cres': [1, 1]}[flag]
            assert small_net(model_type, **{argument: value}).init_kwargs[argument] == value

    def test_output_layers_make_up_the_image(self, model_type):
        net = small_net(model_type, label_dim=0)
        parameters = [p for layer in net.model.output_layers for p in net.model.get_submodule(layer).parameters()]
        for parameter in parameters:
            assert len(parameter) == net.model.out_channels
            torch.nn.init.zeros_(parameter)
        x, sigma, _ = batch_of()
        assert not parameters or not net.model(x, sigma).any()

    def test_features_decide_the_batch_of_a_gpu(self, model_type, monkeypatch):
        net = small_net(model_type)
        features = net.model.features_per_image()
        assert features is None or features > 0
        assert default_batch(net) == BATCH
        monkeypatch.setattr(net, 'parameters', lambda: iter([types.SimpleNamespace(device=torch.device('cuda'))]))
        monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda d: types.SimpleNamespace(total_memory=1 << 37))
        assert default_batch(net) == (BATCH if features is None else 512)

    def test_channels_last_changes_nothing_but_the_layout(self, model_type):
        net = small_net(model_type)
        plain = net(*batch_of())
        out = accelerate(net, channels_last=True)(*batch_of())
        assert net.model.memory_format == torch.channels_last and out.is_contiguous()
        assert_close(out, plain)

    def test_recomputes_or_refuses(self, model_type, monkeypatch):
        net, runs = small_net(model_type).requires_grad_(), []
        monkeypatch.setattr(architecture, 'checkpoint', lambda block, *x, **kw: runs.append(block) or block(*x))
        if net.model.can_recompute:
            accelerate(net, recompute=True)(*batch_of())
            assert runs
        else:
            with pytest.raises(UserError, match=f'{model_type} cannot .*--checkpoint-activations'):
                accelerate(net, recompute=True)

    def test_extra_embedding(self, model_type):
        net = small_net(model_type)
        inputs = batch_of()
        zero = torch.zeros([1, net.model.noise_channels])
        extra = torch.randn([4, net.model.noise_channels])
        plain = net(*inputs)
        assert torch.equal(net(*inputs, extra_embedding=zero), plain)
        assert (net(*inputs, extra_embedding=extra) - plain).abs().max() > 1e-4

    def test_dropout_only_in_training(self, model_type):
        net = small_net(model_type, dropout=0.5)
        inputs = batch_of()
        assert torch.equal(net(*inputs), net(*inputs))
        net.train()
        assert not torch.equal(net(*inputs), net(*inputs))
        torch.manual_seed(5)
        first = net(*inputs)
        torch.manual_seed(5)
        assert torch.equal(net(*inputs), first)

    def test_every_precision(self, model_type):
        model = small_net(model_type).model
        x, sigma, labels = batch_of()
        out = model(x, sigma.log(), labels)
        # Images in float64: float64 throughout, with the same float32 weights.
        assert_close(out.double(), model(x.double(), sigma.log(), labels), rel=1e-4)
        assert_close(model(x.half(), sigma.log(), labels).float(), out, rel=2e-2)
        assert model(x.half(), sigma.log(), labels).dtype == torch.float16

    def test_more_output_than_input_channels(self, model_type):
        kwargs = {k: v for k, v in SMALL[model_type].items() if k != 'model_type'}
        model = MODELS[model_type](8, 3, 5, **kwargs)
        assert model(batch_of()[0], torch.zeros(4)).shape == (4, 5, 8, 8)


@pytest.mark.parametrize('model_type', UNETS)
class TestAnyUNet:

    def test_labels_may_be_float64_too(self, model_type):
        model = small_net(model_type).model
        x, sigma, labels = batch_of()
        assert_close(model(x, sigma.log(), labels).double(),
                     model(x.double(), sigma.double().log(), labels.double()), rel=1e-4)

    def test_extra_embedding_joins_the_noise_embedding(self, model_type):
        model = small_net(model_type).model
        x, sigma, labels = batch_of()
        difference = model.map_noise(sigma) - model.map_noise(sigma * 2)
        assert_close(model(x, sigma * 2, labels, extra_embedding=difference), model(x, sigma, labels))

    def test_label_dropout_only_in_training(self, model_type):
        net = small_net(model_type, label_dropout=1.0, dropout=0)
        x, sigma, labels = batch_of()
        unlabelled = net(x, sigma)
        assert not torch.allclose(net(x, sigma, labels), unlabelled, atol=1e-4)
        net.train()
        assert_close(net(x, sigma, labels), unlabelled, rel=1e-6)
        # Half of the images lose their label, each by its own draw.
        half = small_net(model_type, label_dropout=0.5, dropout=0).train()
        torch.manual_seed(3)
        out = half(*(t[:1].expand(64, *t.shape[1:]) for t in (x, sigma, labels)))
        kept = (out - unlabelled[:1]).abs().amax(dim=(1, 2, 3)) > 1e-4
        assert 16 < kept.sum() < 48


def test_narrow_adm_levels_have_no_attention():
    net = small_net('DhariwalUNet', attn_resolutions=[8, 4])
    assert not hasattr(net.model.enc['8x8_block0'], 'qkv') and hasattr(net.model.enc['4x4_block0'], 'qkv')


# -- a network through the commands

@pytest.mark.filterwarnings('ignore:.*pin_memory.*')
@pytest.mark.parametrize('system', ['edm', 'warm'])
def test_a_new_network_is_trained_and_sampled(tmp_path, system):
    """Both as EDM and as Warm, there with the blur as a further condition and a preset meant for U-Nets."""
    flags = ['--preset=digits', '--augment=0.5'] if system == 'warm' else ['--channels-last=1', '--precision=bf16']
    result = invoke('train.py', '--arch=patches', f'--precond={system}', *flags, f'--outdir={tmp_path}', '--nosubdir',
                    '--batch=8', '--duration=0.000016', '--workers=0', '--grid=2', '--seed=0')
    assert result.exit_code == 0, (result.output, result.exception)
    kwargs = json.loads((tmp_path / 'training_options.json').read_text())['network_kwargs']
    assert kwargs['model_type'] == 'Patches' and kwargs['width'] == 24 and 'channel_mult' not in kwargs
    result = invoke('generate.py', f'--network={tmp_path}/network-snapshot-000000.safetensors', '--seeds=0-2',
                    f'--outdir={tmp_path}/out', '--steps=2')
    assert result.exit_code == 0, (result.output, result.exception)
    assert len(list((tmp_path / 'out').glob('*.png'))) == 3


@pytest.mark.parametrize('flag, sentence', [
    ('--cbase=8', '--cbase has no effect with --arch=patches; leave it out'), ('--cres=1,2', '--cres has no effect'),
    ('--checkpoint-activations', 'Patches cannot recompute its features; leave out --checkpoint-activations')])
def test_flags_that_a_new_network_does_not_take(flag, sentence):
    refused(invoke('train.py', '-n', '--arch=patches', flag), sentence)


# -- preconditioning

def test_edm_scalings_give_unit_variance():
    """Karras et al. 2022, Eq. 131–138: F's input and target have unit variance, and c_out is as small as possible."""
    sigma, sigma_data = torch.linspace(-4, 4, 9, dtype=torch.float64).exp(), 0.5
    c_skip, c_out, c_in, c_noise = edm_scalings(sigma, sigma_data)
    assert torch.allclose(c_in ** 2 * (sigma ** 2 + sigma_data ** 2), torch.ones_like(sigma))

    def target_variance(c):
        return (1 - c) ** 2 * sigma_data ** 2 + c ** 2 * sigma ** 2

    assert torch.allclose(target_variance(c_skip), c_out ** 2)
    assert (target_variance(c_skip + 1e-3) > c_out ** 2).all() and (target_variance(c_skip - 1e-3) > c_out ** 2).all()
    assert torch.equal(c_noise, sigma.log() / 4)


def test_vp_time_and_noise_level():
    t = torch.linspace(1e-5, 1, 50, dtype=torch.float64)
    assert torch.allclose(vp_sigma_inv(vp_sigma(t)), t, rtol=1e-9)
    assert torch.allclose(vp_sigma(t.float()).double(), vp_sigma(t), rtol=1e-5)
    net = small_net(precond='VPPrecond')
    assert net.sigma_min == pytest.approx(math.sqrt(math.expm1(0.5 * 19.9e-10 + 0.1e-5)))
    assert net.sigma_max == pytest.approx(math.sqrt(math.expm1(0.5 * 19.9 + 0.1)))
    assert net.sigma(net.sigma_inv(3.0)) == pytest.approx(3.0, rel=1e-5)


def test_iddpm_rounds_to_its_grid():
    net = small_net(precond='iDDPMPrecond')
    assert (net.u[:-1] > net.u[1:]).all() and net.u[-1] == 0
    assert (net.sigma_min, net.sigma_max) == (float(net.u[999]), float(net.u[0]))
    index = torch.tensor([[0, 1], [500, 999]])
    between = net.u[index].double() * (1 + 1e-4)
    assert torch.equal(net.round_sigma(between, return_index=True), index)
    assert torch.equal(net.round_sigma(between), net.u[index].double())
    assert net.round_sigma(1e9) == net.u[0] and net.round_sigma(0) == 0 and 0 < (net.round_sigma(5) - 5).abs() < 0.1
    # Noise levels that round to the same one get the same F.
    x, _, _ = batch_of()
    F = [net.run_model(x, net.scalings(net.as_sigma(s, x))[3]) for s in (net.u[500], net.u[500] * 1.0001)]
    assert torch.equal(*F) and F[0].shape == (4, 6, 8, 8)


def test_float16_only_on_cuda():
    cpu, cuda = torch.device('cpu'), torch.device('cuda', 0)
    assert PRECISIONS['fp16'].dtype_on(cuda) == torch.float16 and PRECISIONS['fp16'].dtype_on(cpu) == torch.float32
    assert small_net(use_fp16=True).precision == 'fp16'
    assert small_net().precision == 'fp32'


def test_recorded_arguments_are_a_copy():
    mult = [1]
    net = networks.EDMPrecond(8, 1, model_type='SongUNet', model_channels=8, channel_mult=mult, num_blocks=1)
    mult.append(2)
    assert net.init_kwargs['channel_mult'] == [1]


def test_iddpm_rounds_in_the_dtype_it_is_given():
    net = networks.iDDPMPrecond(8, 1, model_type='SongUNet', model_channels=8, channel_mult=[1], num_blocks=1)
    for dtype in (torch.float32, torch.float64):
        assert net.round_sigma(torch.tensor([1.0], dtype=dtype)).dtype == dtype


# -- bad input

@pytest.mark.parametrize('kwargs, names', [
    (dict(model_type='NoUNet'), ['NoUNet', 'SongUNet', 'DhariwalUNet']),
    (dict(embedding_type='sine'), ['embedding_type', 'sine', *EMBEDDINGS]),
    (dict(encoder_type='sine'), ['encoder_type', 'sine', *ENCODERS]),
    (dict(decoder_type='residual'), ['decoder_type', 'residual', *DECODERS]),
    (dict(channel_mult=[1, 1, 1, 1, 1]), ['8x8', 'divisible by 16']),
    (dict(model_channels=2), ['not 2', 'model_channels']),
    (dict(model_channels=140), ['140', 'model_channels', 'multiples of 32']),
])
def test_impossible_networks(kwargs, names):
    with pytest.raises(UserError) as error:
        networks.EDMPrecond(8, 3, **{**SMALL['SongUNet'], **kwargs})
    assert all(name in str(error.value) for name in names)


def test_heads_must_divide_channels():
    with pytest.raises(UserError, match='attention heads'):
        networks.EDMPrecond(8, 3, **{**SMALL['DhariwalUNet'], 'model_channels': 56})


def test_up_and_down_at_once():
    with pytest.raises(UserError, match='not both'):
        Conv2d(4, 4, 0, up=True, down=True)


def test_impossible_inputs():
    net = small_net()
    x, sigma, labels = batch_of()
    for args, name in (((x[:, :1], sigma), r'\[1, 8, 8\]'), ((x[..., :4], sigma), r'\[3, 8, 4\]'),
                       ((x, sigma[:3]), '3 noise levels'), ((x, sigma, labels[:, :2]), r'\[4, 2\]'),
                       ((x, sigma, labels[:3]), r'\[3, 3\]'), ((x, sigma, labels[None]), r'\[1, 4, 3\]')):
        with pytest.raises(UserError, match=name):
            net(*args)
    with pytest.raises(UserError, match='label dimension 0'):
        small_net(label_dim=0)(x, sigma, labels)


def test_layers_keep_float32_weights():
    init = Init('xavier_normal')
    for layer, shape in ((Linear(4, 8, init), [1, 4]), (GroupNorm(8), [1, 8, 2, 2]),
                         (Conv2d(4, 8, 3, init), [1, 4, 2, 2])):
        for dtype in (torch.float16, torch.float32, torch.float64):
            assert layer(torch.ones(shape, dtype=dtype)).dtype == dtype and layer.weight.dtype == torch.float32


@pytest.mark.parametrize('name, value', [(name, value) for name, values in {
    'sigma_data': ['a', [1], None, 0, -1, float('nan'), float('inf')], 'dropout': [1, -0.1, float('nan'), 'a']}.items()
    for value in values])
def test_numbers_that_no_network_can_use_are_refused(name, value):
    """As in a snapshot that somebody else has edited."""
    with pytest.raises(UserError, match=f'{name}=.*; give a number'):
        networks.EDMPrecond(8, 3, **{name: value}, **SMALL['SongUNet'])
