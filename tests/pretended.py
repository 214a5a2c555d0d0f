"""A pretended GPU, for machines that have none: a device with the CPU's numbers and a GPU's rules.

Tensors on it may not be mixed with the CPU's, and what would make the host wait for a GPU is listed: values read
back, tensors made of Python lists, copies between the two. `python -m tests.pretended` runs every system's training
step and sampler there, and prints {case: what was wrong} as JSON; it is a process of its own, since PyTorch takes such
a device only once.
"""

import contextlib
import json
import sys
import traceback
from functools import partial

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

NAME = 'pretended'
WAITS = {'_local_scalar_dense', 'item', 'nonzero', 'masked_select', 'is_nonzero', 'equal', 'unique2'}
available = hasattr(backend_registration, '_setup_privateuseone_for_python_backend')  # 2.11 has it, 2.6 has not


class Pretended(torch.Tensor):
    """A tensor on the device; `values` has its numbers."""

    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, values.stride(), values.storage_offset(),
                                                   dtype=values.dtype, device=f'{NAME}:0')

    def __init__(self, values):
        self.values = values

    def tolist(self):
        return self.values.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f'{func} outside of Device')


class Device(TorchDispatchMode):
    """Inside, operations on pretended tensors, or that ask for the device, give pretended tensors.

    Attributes:
        waits: Names of the operations for which the host would have waited for a GPU.
    """

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        values = [*args, *kwargs.values()]
        values = [x for value in values for x in (value if isinstance(value, (list, tuple)) else [value])]
        tensors = [x for x in values if isinstance(x, torch.Tensor)]
        ours = [t for t in tensors if isinstance(t, Pretended)]
        if ours and name != 'copy_':
            others = [t for t in tensors if not isinstance(t, Pretended) and t.ndim > 0]
            assert not others, f'{name} of tensors on the device and of shape {list(others[0].shape)} on the CPU'
        result_is_ours = bool(ours)
        if kwargs.get('device') is not None:
            result_is_ours = torch.device(kwargs['device']).type == NAME
            kwargs['device'] = 'cpu'
        kwargs.pop('pin_memory', None)
        sides = {result_is_ours, *(isinstance(t, Pretended) for t in tensors)}
        crosses = name in ('_to_copy', 'copy_') and len(sides) > 1
        if crosses or ours and name in WAITS:
            self.waits.append(name)
        out = func(*map(on_cpu, args), **{key: on_cpu(value) for key, value in kwargs.items()})
        if func._schema.is_mutable and isinstance(out, torch.Tensor):
            return args[0]  # in place
        if not result_is_ours:
            return out
        return on_device(out)


def on_cpu(x):
    """`x`, or its items, with pretended tensors replaced by their values."""
    if isinstance(x, (list, tuple)):
        return type(x)(map(on_cpu, x))
    return x.values if isinstance(x, Pretended) else x


def on_device(x):
    """`x`, or its items, with tensors moved to the device."""
    if isinstance(x, (list, tuple)):
        return type(x)(map(on_device, x))
    return Pretended(x) if isinstance(x, torch.Tensor) else x


def to_device(net):
    """Move a network's tensors to the device; call inside Device."""
    for module in net.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    moved = Pretended(tensor.detach())
                    tensors[name] = torch.nn.Parameter(moved) if tensors is module._parameters else moved
    return net


# -- the cases

NETWORK = dict(img_resolution=8, img_channels=1, model_type='SongUNet', model_channels=16, channel_mult=[1, 2],
               num_blocks=1, attn_resolutions=[4])
NETWORKS = {'ddpmpp': {}, 'adm': dict(model_type='DhariwalUNet'),
            'ncsnpp': dict(embedding_type='fourier', encoder_type='residual', channel_mult_noise=2,
                           resample_filter=[1, 3, 3, 1])}
FAMILIES = ('0.5', '0,0.5,2', '0.1-2')  # of --bnr
SHORT = {'ihdm': dict(ihdm_levels=4)}  # where the number of steps is the network's
# Samplers that read values back between two steps, and why.
READ_BACK = {'iddpm': 'its noise levels are looked up in a table on the device, once a sampling',
             'pfgmpp': 'radii of the start are drawn on the CPU, once a sampling',
             'ihdm': 'starts from training images', 'cold': 'starts from training images'}


def cases():
    """{name: function} of everything that is tried."""
    from training.dataset import EMBEDDED
    from warm.blur import BLUR_RATES
    from warm.choices import BLUR_EMBEDDINGS, REST_LOSSES, REST_SCALES
    from warm.samplers import SOLVERS
    from warm.systems import SYSTEMS
    from warm.targets import TARGETS
    found = {'mixing': mix, 'scores': score}
    for name, system in SYSTEMS.items():
        if system.trainable:
            found[f'step of {name}'] = partial(step, system, label_dim=10)
        options = dict(data=EMBEDDED) if system.starts_from_data else {}
        found[f'sampler of {name}'] = partial(sample, system, SHORT.get(name), **options)
    edm, warm = SYSTEMS['edm'], SYSTEMS['warm']
    for arch, kwargs in NETWORKS.items():
        for precision in ('fp32', 'bf16'):
            found[f'step of {arch} in {precision}'] = partial(step, edm, precision, **kwargs)
    for solver in SOLVERS:
        found[f'edm by {solver}'] = partial(sample, edm, solver=solver)
        for bnr in FAMILIES:
            found[f'warm {bnr} by {solver}'] = partial(sample, warm, dict(bnr=bnr), bnr=0.5, solver=solver)
    for bnr in FAMILIES:
        found[f'step of warm {bnr}'] = partial(step, warm, bnr=bnr)
    for option, values in (('targets', TARGETS), ('blur', BLUR_RATES), ('rest_scale', REST_SCALES),
                           ('rest_loss', REST_LOSSES), ('blur_embedding', BLUR_EMBEDDINGS)):
        for value in values:
            found[f'step of warm, {option} {value}'] = partial(step, warm, **{option: value})
            found[f'sampler of warm, {option} {value}'] = partial(sample, warm, {option: value})
    found['warm on another schedule'] = partial(sample, warm, dict(bnr_schedule='blurring'))
    found['warm with churn'] = partial(sample, warm, S_churn=5)
    found['edm with churn'] = partial(sample, edm, S_churn=5)
    found['edm on another schedule'] = partial(sample, edm, schedule='vp', scaling='vp', solver='euler')
    found['edm with scaled noise'] = partial(sample, edm, epsilon_scale=1.001)
    return found


def make_net(system, precision='fp32', **kwargs):
    """A small network of a system on the device."""
    options = {name: value for name, value in system.network_kwargs({}).items() if value is not None}
    net = system.network_class(**{**NETWORK, **options, **kwargs})
    net.precision = precision
    return to_device(net)


def one_step(net, ema, optimizer, loss_fn, images, labels, pipe):
    """A step as the loop makes it: augmentation, gradients, optimiser, moving average; returns the loss."""
    from training import training_loop as tl
    optimizer.zero_grad(set_to_none=True)
    loss = loss_fn(net, images, labels, pipe)
    tl.training_stats.report('Loss/loss', loss)
    with net.products():
        loss.sum().mul(1 / len(images)).backward()
    tl.clean_gradients(net)
    optimizer.step()
    tl.update_ema(ema, net, 0.9)
    return loss


def step(system, precision='fp32', label_dim=0, *, device, **kwargs):
    """What the host waits for in a training step as the loop makes it, once a first step has made its constants."""
    from training.augment import TRAIN_AUGMENT, AugmentPipe
    pipe = AugmentPipe(p=0.5, **TRAIN_AUGMENT)
    net = make_net(system, precision, label_dim=label_dim, augment_dim=pipe.label_dim, **kwargs)
    ema = make_net(system, label_dim=label_dim, augment_dim=pipe.label_dim, **kwargs).requires_grad_(False)
    optimizer = torch.optim.Adam(net.parameters())
    images = torch.rand([4, 1, 8, 8], device=NAME) * 2 - 1
    labels = torch.eye(10, device=NAME)[:4] if label_dim else None
    loss_fn = system.make_loss(net)
    for _ in range(2):
        device.waits.clear()
        loss = one_step(net, ema, optimizer, loss_fn, images, labels, pipe)
    on_device = (loss, *net.parameters(), *(p.grad for p in net.parameters() if p.grad is not None))
    assert {t.device.type for t in on_device} == {NAME}
    return device.waits


@torch.no_grad()
def sample(system, network_options=None, *, device, **options):
    """What the host waits for in a sampling, once a first one has made its constants."""
    net = make_net(system, **(network_options or {})).eval()
    if 'num_steps' in system.sample_options:
        options['num_steps'] = 3
    sampler = system.make_sampler(net, options)
    for _ in range(2):
        latents = torch.randn([4, 1, 8, 8], device=NAME)
        device.waits.clear()
        images = sampler(latents, None, torch.randn_like)
    waits = device.waits.copy()
    assert images.device.type == NAME and images.isfinite().all()
    if system.name in READ_BACK:
        return [] if waits else ['reads nothing back any more']
    return waits


def score(device):
    """All metrics' sums and features can be computed on the device."""
    from training import detectors, metrics
    detectors.full_float32 = lambda device: contextlib.nullcontext()  # the device knows no autocast
    detector = detectors.PixelDetector(NAME)
    plain, detector.has_probs = detector.run, True
    detector.run = lambda rgb, *wanted: (plain(rgb, *wanted)[0], plain(rgb, *wanted)[0].softmax(1))
    accumulator = metrics.Accumulator(detector, list(metrics.METRICS), 1000, 100, None)
    for _ in range(10):
        accumulator.add(torch.randint(0, 256, [100, 3, 16, 16], dtype=torch.uint8, device=NAME))
    stats = accumulator.statistics()
    assert metrics.score(['fid'], stats, stats, 0)['FID'] < 1e-3
    return []


def mix(device):
    """Both kinds of faults are found: waits and tensors of two devices."""
    torch.ones([], device=NAME).item()
    torch.tensor([1., 2.], device=NAME)
    torch.ones([2]).to(NAME)[:1].copy_(torch.ones([1]))
    assert device.waits == ['_local_scalar_dense', '_to_copy', '_to_copy', 'copy_'], device.waits
    try:
        torch.ones([2], device=NAME) + torch.ones([2])
    except AssertionError:
        return []
    return ['tensors of two devices were added']


def by_copy(make):
    """torch.tensor or torch.as_tensor by way of the CPU: made on the device, they would need kernels that it lacks."""
    def made(*args, device=None, **kwargs):
        return make(*args, **kwargs).to(device)
    return made


def main():
    torch.tensor, torch.as_tensor = by_copy(torch.tensor), by_copy(torch.as_tensor)
    backend_registration._setup_privateuseone_for_python_backend(NAME)
    torch.set_num_threads(1)
    results = {}
    for name, case in cases().items():
        torch.manual_seed(0)
        try:
            with Device() as device:
                results[name] = ', '.join(case(device=device))
        except Exception as e:
            traceback.print_exc()
            results[name] = f'{type(e).__name__}: {e}'
    json.dump(results, sys.stdout)


if __name__ == '__main__':
    main()
