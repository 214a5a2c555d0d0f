"""Precision of the network: what stays float32, how near the fast ones come, and where TF32 may act."""

import contextlib
import json
import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dnnlib import UserError
from tests.commands import SMALL, invoke, json_lines, refused, succeed
from tests.small_networks import DEVICES, NETWORKS, distance, make_net, outputs_and_gradients
from torch_utils.precision import PRECISIONS, effective_precision
from training import layers
from training.augment import TRAIN_AUGMENT, AugmentPipe
from training.loss import EDMLoss
from training.networks import EDMPrecond
from training.provenance import sampling_facts
from training.snapshot import build_network, read_snapshot, save_snapshot
from warm.loss import WarmLoss
from warm.precond import WarmPrecond
from warm.systems import SYSTEMS

# ‖difference‖/‖F‖ of outputs; gradients may have three times that. About twice the most that float16, bfloat16 and
# truncation of all factors to TF32's 10 bits gave on a CPU, over eight seeds: 2.2e-3, 1.7e-2, 2.6e-3.
TOLERANCE = {'tf32': 5e-3, 'bf16': 3e-2, 'fp16': 5e-3}


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('model_type', NETWORKS)
@pytest.mark.parametrize('precision', [name for name in PRECISIONS if name != 'fp32'])
def test_near_float32(precision, model_type, device):
    """‖F − F₃₂‖/‖F₃₂‖ ≤ 3 % in bf16, 0.5 % in fp16 and tf32; finite float32 gradients within three times that."""
    net = make_net(model_type, device=device)
    x, c_noise = torch.randn([4, 3, 8, 8], device=device), torch.randn([4], device=device)
    reference = outputs_and_gradients(net, x, c_noise)
    net.precision = precision
    outputs, grads = outputs_and_gradients(net, x, c_noise)
    assert all(t.dtype == torch.float32 and t.isfinite().all() for t in (*outputs, *grads))
    assert distance(outputs, reference[0]) <= TOLERANCE[precision]
    assert distance(grads, reference[1]) <= 3 * TOLERANCE[precision]
    computes_alike = device == 'cpu' and precision != 'bf16'
    assert (distance(outputs, reference[0]) == 0) == computes_alike


@pytest.mark.parametrize('name, kind, expected', [
    ('fp16', 'cpu', 'fp32'), ('tf32', 'cpu', 'fp32'), ('bf16', 'cpu', 'bf16'), ('fp32', 'cpu', 'fp32'),
    ('fp16', 'cuda', 'fp16'), ('tf32', 'cuda', 'tf32')])
def test_records_name_the_precision_that_was_computed_in(name, kind, expected):
    assert effective_precision(name, torch.device(kind)) == expected
    if kind == 'cpu':
        net = make_net()
        net.precision = name
        system = SYSTEMS['edm']
        assert sampling_facts(net, system, {}, system.make_sampler(net, {}))['precision'] == expected


def test_bf16_body_and_what_surrounds_it():
    """Convolutions run in bfloat16; embeddings, preconditioning and the result do not; force_fp32 overrules."""
    net, seen = make_net(), {}
    net.precision = 'bf16'
    for module in net.modules():
        if isinstance(module, (layers.Conv2d, layers.Linear, layers.GroupNorm)):
            module.register_forward_hook(lambda m, inputs, out: seen.setdefault(type(m), set()).add(out.dtype))
    x, sigma = torch.randn([2, 3, 8, 8]), torch.tensor([0.5, 2.])
    out = net(x, sigma)
    assert seen == {layers.Conv2d: {torch.bfloat16}, layers.GroupNorm: {torch.bfloat16}, layers.Linear: {torch.float32}}
    assert out.dtype == torch.float32
    exact = net(x, sigma, force_fp32=True)
    net.precision = 'fp32'
    assert torch.equal(net(x, sigma), exact) and not torch.equal(out, exact)


@pytest.mark.parametrize('dtype', layers.SHORT_TYPES)
@pytest.mark.parametrize('silu', [False, True])
def test_group_norm_has_float32_statistics(dtype, silu):
    """Values around 30 with deviation 1: statistics in a short type would be far off; rounding once is not."""
    torch.manual_seed(0)
    norm = layers.GroupNorm(16)
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    x = (torch.randn([2, 16, 8, 8]) + 30).to(dtype).requires_grad_()
    y = norm(x, silu)
    grad = torch.randn_like(y)
    x_grad, *p_grads = torch.autograd.grad(y, [x, norm.weight, norm.bias], grad)

    exact = layers.GroupNorm(16).double()
    exact.load_state_dict(norm.state_dict())
    x64 = x.detach().double().requires_grad_()
    y64 = exact(x64, silu)
    g64 = torch.autograd.grad(y64, [x64, exact.weight, exact.bias], grad.double())
    unit = torch.finfo(dtype).eps
    assert y.dtype == x_grad.dtype == dtype and distance([y], [y64]) < unit / 2
    assert distance([x_grad], g64[:1]) < unit / 2 and distance(p_grads, g64[1:]) < 1e-5
    mean = x.mean(dim=(2, 3), keepdim=True, dtype=dtype)
    assert ((mean - x64.mean(dim=(2, 3), keepdim=True)).abs().max() > 5 * unit)  # what short statistics would do


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', layers.SHORT_TYPES)
def test_softmax_is_float32(dtype, device):
    """Against float64 on the same rounded inputs, the error is that of rounding the result, not of rounded weights."""
    torch.manual_seed(0)
    qkv = (torch.randn([2, 3 * 32, 16, 16], device=device) * 1.5).to(dtype)
    exact = layers.attend(qkv.double(), 1)
    q, k, v = layers.split_heads(qkv, 1)
    rounded = ((q @ k.transpose(-1, -2) / math.sqrt(32)).softmax(dim=-1) @ v).transpose(-1, -2).reshape(exact.shape)
    error = distance([layers.attend(qkv, 1)], [exact])
    assert error < torch.finfo(dtype).eps and error < 0.7 * distance([rounded], [exact])


class ProductFlags(TorchDispatchMode):
    """Collects the TF32 switches at each matrix product and convolution of float32."""

    NAMES = ('mm', 'bmm', 'addmm', 'convolution', 'convolution_backward')

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.NAMES and any(
                isinstance(a, torch.Tensor) and a.dtype == torch.float32 for a in args):
            self.seen.add((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def tf32_everywhere():
    """TF32 allowed for the whole process, as somebody may have set it; nothing inside may change that."""
    former = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    try:
        yield
        assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = former


@pytest.mark.parametrize('precision, allowed', [('fp32', False), ('tf32', True)])
def test_tf32_only_inside_the_network(precision, allowed):
    """The network's products, backward ones included, follow the precision; the augmentation's are never rounded."""
    net = make_net(network_class=WarmPrecond, augment_dim=9)
    net.precision = precision
    images = torch.rand([2, 3, 8, 8]) * 2 - 1
    with tf32_everywhere():
        with ProductFlags() as augmenting:
            AugmentPipe(p=1, **TRAIN_AUGMENT, brightness=1)(images)
        with ProductFlags() as network:
            loss = net.run_model(images, torch.zeros([2])).square().sum()
            with net.products():
                loss.backward()
    assert augmenting.seen == {(False, False)} and network.seen == {(allowed, allowed)}


def test_blur_is_float64():
    """Warm's transforms have no float32 product that TF32 could touch."""
    from warm.blur import blur_and_rest
    with ProductFlags() as flags:
        blur_and_rest(torch.randn([2, 3, 8, 8]), torch.ones([2, 1, 1, 1]))
    assert flags.seen == set()


def test_names():
    net = make_net(use_fp16=True)
    assert net.precision == 'fp16' and make_net().precision == 'fp32'
    with pytest.raises(UserError, match='fp32, tf32, bf16, fp16'):
        net.precision = 'fp8'
    assert net.precision == 'fp16'


def test_snapshots_do_not_know_the_precision(tmp_path):
    net = make_net().eval()
    for name in PRECISIONS:
        net.precision = name
        save_snapshot(tmp_path / f'{name}.safetensors', net, 'edm')
    contents = {(tmp_path / f'{name}.safetensors').read_bytes() for name in PRECISIONS}
    assert len(contents) == 1
    assert build_network(read_snapshot(tmp_path / 'bf16.safetensors'), SYSTEMS).precision == 'fp32'


@pytest.mark.parametrize('name', PRECISIONS)
def test_flag(name):
    out = invoke('train.py', '-n', f'--precision={name}')
    assert out.exit_code == 0 and f'"precision": "{name}"' in out.output and f'-batch512-{name}\n' in out.output
    assert f'"use_fp16": {"true" if name == "fp16" else "false"}' in out.output


def test_edms_name_of_the_flag():
    assert invoke('train.py', '-n', '--fp16=1', '--seed=1').output == invoke(
        'train.py', '-n', '--precision=fp16', '--fp16=1', '--seed=1').output
    assert '"precision": "fp32"' in invoke('train.py', '-n', '--fp16=0').output
    refused(invoke('train.py', '-n', '--fp16=1', '--precision=bf16'), '--fp16=1 and --precision=bf16 contradict')
    refused(invoke('train.py', '-n', '--fp16=0', '--precision=fp16'), '--fp16=0 and --precision=fp16 contradict')


@pytest.mark.parametrize('loss', [EDMLoss, WarmLoss])
def test_losses_of_a_step(loss):
    """For the same draws, bf16's mean loss differs from fp32's by less than 1 %."""
    values = []
    for precision in ('fp32', 'bf16'):
        net = make_net(network_class=WarmPrecond if loss is WarmLoss else EDMPrecond)
        net.precision = precision
        torch.manual_seed(1)
        values.append(loss()(net, torch.rand([64, 3, 8, 8]) * 2 - 1).mean().item())
    assert values[1] == pytest.approx(values[0], rel=0.01) and values[0] != values[1]


def test_short_runs_agree(tmp_path):
    """64 steps on the digits, the same seeds: the losses of each quarter agree within 3 %, and fall alike."""
    losses = {}
    for precision in ('fp32', 'bf16'):
        succeed('train.py', *SMALL, f'--outdir={tmp_path}', '--precond=warm', '--duration=0.004096', '--tick=1',
                '--batch=64', '--seed=5', f'--precision={precision}', '--grid=0', '--lr=0.002')
        run = next(tmp_path.glob(f'*-{precision}'))
        lines = json_lines(run / 'stats.jsonl')
        losses[precision] = torch.tensor([line['Loss/loss']['mean'] for line in lines])
    assert len(losses['fp32']) == 5 and losses['fp32'][-1] < 0.9 * losses['fp32'][1]
    torch.testing.assert_close(losses['bf16'], losses['fp32'], rtol=0.03, atol=0)
    assert not torch.equal(losses['bf16'], losses['fp32'])


def test_generate_flag(tmp_path):
    """The precision of sampling is recorded with the images; another one counts as other options."""
    save_snapshot(tmp_path / 'a.safetensors', make_net().eval(), 'edm')
    common = ['generate.py', f'--network={tmp_path / "a.safetensors"}', '--seeds=0-1', '--steps=2']
    for precision in ('fp32', 'bf16'):
        out = invoke(*common, f'--outdir={tmp_path / precision}', f'--precision={precision}')
        assert out.exit_code == 0, out.output
        assert json.loads((tmp_path / precision / 'generation.json').read_text())['precision'] == precision
    refused(invoke(*common, f'--outdir={tmp_path / "bf16"}'), 'other options', '--overwrite')


def test_silu_inside_the_norm_is_silu_after_it():
    norm, x = layers.GroupNorm(16), torch.randn([2, 16, 4, 4])
    assert torch.equal(norm(x, silu=True), F.silu(norm(x)))
