"""Fast paths against the plain ones they stand for, and steps in which the host never waits for the GPU."""

import contextlib
import copy
import gc
import itertools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
import zipfile

import numpy as np
import PIL.Image
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dnnlib import UserError
from tests.commands import ROOT, SMALL, invoke, json_lines, refused, succeed
from tests.pretended import WAITS, one_step
from tests.small_networks import DEVICES, NETWORKS, distance, make_net, outputs_and_gradients
from training import acceleration, decoded, generated, generation
from training import batches as b
from training import training_loop as tl
from training.acceleration import accelerate
from training.augment import TRAIN_AUGMENT, AugmentPipe
from training.dataset import EMBEDDED, ImageFolderDataset, load_embedded
from training.image_codec import encode_png
from training.layers import (GroupNorm, double, filter_down, filter_up, make_resample_filter, norm_gradients,
                             norm_gradients_to_compile, pool)
from training.progress import load_optimizer
from training.stand_ins import CountedModel, stand_in
from warm.systems import SYSTEMS

# What is trained: name → (system, arguments of its network).
STEPS = {**{name: (name, {}) for name, system in SYSTEMS.items() if system.trainable},
         'warm-list': ('warm', dict(bnr='0,0.1,0.5')), 'warm-range': ('warm', dict(bnr='0.1-2'))}


# -- the network

@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('model_type', NETWORKS)
def test_channels_last_is_as_exact(model_type, device):
    """Outputs and gradients are not much farther from float64 than the plain layout's: sums are in another order.

    On a GPU, the two layouts may use different algorithms for convolutions (Winograd's, for one), but never TF32, which
    would be 1e-3 away.
    """
    factor, limit = (3, 1e-5) if device == 'cpu' else (5, 5e-5)
    net = make_net(model_type, device=device)
    x, c_noise = torch.randn([4, 3, 8, 8], device=device), torch.randn([4], device=device)
    exact = copy.deepcopy(net).double()
    out = exact.model(x.double(), c_noise.double())
    out.square().mean().backward()
    exact = [out], [p.grad for p in exact.parameters()]
    plain = outputs_and_gradients(net, x, c_noise)
    other = outputs_and_gradients(accelerate(net, channels_last=True), x, c_noise)
    for a, p, e in zip(other, plain, exact):  # at least some roundings, should the plain layout's happen to cancel
        assert distance(a, e) <= max(factor * distance(p, e), 3e-6) < limit
    assert other[0][0].is_contiguous() and all(p.is_contiguous() for p in net.parameters())
    features = net.model.enc['8x8_conv'](x.contiguous(memory_format=torch.channels_last))
    assert features.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('device, precision, compile, wanted', [
    ('cuda', 'bf16', True, True), ('cuda', 'fp16', True, True), ('cuda', 'tf32', True, False),
    ('cuda', 'fp32', True, False), ('cuda', 'bf16', False, False), ('cpu', 'bf16', True, False)])
def test_layout_where_nobody_asks(device, precision, compile, wanted):
    assert acceleration.wants_channels_last(torch.device(device), precision, compile) is wanted


class NormLayouts(TorchDispatchMode):
    """Notes whether the features given to PyTorch's group norm were contiguous."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ == 'native_group_norm':
            self.found.append(args[0].is_contiguous())
        elif func.overloadpacket.__name__ == 'native_group_norm_backward':
            self.found.append(args[0].is_contiguous() and args[1].is_contiguous())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('model_type', NETWORKS)
def test_norms_of_short_types_with_channels_last(model_type, device):
    """PyTorch's kernel, which on CUDA takes no other, gets contiguous features; the network's keep their layout."""
    net = accelerate(make_net(model_type, device=device), precision='bf16', channels_last=True)
    layouts = []
    for module in net.modules():
        if isinstance(module, GroupNorm):
            module.register_forward_hook(lambda m, inputs, out: layouts.append((layout(inputs[0]), layout(out))))
    with NormLayouts() as norms:
        outputs, grads = outputs_and_gradients(net, torch.randn([4, 3, 8, 8], device=device),
                                               torch.randn([4], device=device))
    assert len(norms.found) == 2 * len(layouts) and all(norms.found)
    assert all(before == after for before, after in layouts) and torch.channels_last in dict(layouts)
    assert all(t.isfinite().all() for t in (*outputs, *grads))


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('silu', [False, True])
@pytest.mark.parametrize('offset', [0, 30])
def test_gradients_of_norms(offset, silu, memory_format):
    """PyTorch's kernel and the written-out form both give float64's gradients, up to one rounding to bfloat16."""
    torch.manual_seed(0)
    x = (torch.randn([4, 64, 16, 16]) + offset).to(torch.bfloat16, memory_format=memory_format)
    grad = torch.randn_like(x)
    weight, bias = torch.randn(64), torch.randn(64)
    _, mean, rstd = torch.native_group_norm(x.float().contiguous(), weight, bias, 4, 64, 256, 16, 1e-5)
    exact = [t.double().requires_grad_() for t in (x, weight, bias)]
    y = torch.nn.functional.group_norm(exact[0], 16, *exact[1:], 1e-5)
    (torch.nn.functional.silu(y) if silu else y).backward(grad.double())
    for gradients in (norm_gradients, norm_gradients_to_compile):
        found = gradients(grad, x, weight, bias, mean, rstd, 16, silu)
        assert layout(found[0]) == memory_format and found[0].dtype == x.dtype
        assert distance(found[:1], [exact[0].grad]) < 2e-3  # 2^−9 at most; 1.7e-3 on average
        assert distance(found[1:], [t.grad for t in exact[1:]]) < 1e-5


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64])
def test_plain_resampling_to_the_bit(dtype, memory_format):
    """Averaging and copying pixels give what the convolutions with the taps [1, 1] give."""
    taps = make_resample_filter([1, 1])
    for quick, slow, size in ((pool, filter_down, 4), (double, filter_up, 16)):
        x = torch.randn([2, 3, 8, 8]).to(dtype, memory_format=memory_format).requires_grad_()
        grad = torch.randn([2, 3, size, size]).to(dtype)
        results = []
        for out in (quick(x), slow(x, taps, 0)):
            x.grad = None
            out.backward(grad)
            results.append((out, x.grad))
        (a, grad_a), (b, grad_b) = results
        assert torch.equal(a, b) and layout(quick(x)) == memory_format
        torch.testing.assert_close(grad_a, grad_b)


def layout(x):
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('model_type', NETWORKS)
def test_recomputation_changes_nothing(model_type, device):
    """Outputs and gradients stay the same bit for bit."""
    net = make_net(model_type, device=device)
    x, c_noise = torch.randn([4, 3, 8, 8], device=device), torch.randn([4], device=device)
    with torch.backends.cudnn.flags(enabled=True, deterministic=True):  # its quickest gradients are summed in any order
        plain = outputs_and_gradients(net, x, c_noise)
        recomputed = outputs_and_gradients(accelerate(net, recompute=True), x, c_noise)
    assert all(torch.equal(a, p) for a, p in zip(sum(recomputed, []), sum(plain, [])))


def test_recomputation_draws_the_same_dropout():
    net = make_net()
    for module in net.modules():
        if hasattr(module, 'style'):
            object.__setattr__(module.style, 'dropout', 0.5)
    x, c_noise, results = torch.randn([4, 3, 8, 8]), torch.randn([4]), []
    for recompute in (False, True):
        torch.manual_seed(3)
        results.append(outputs_and_gradients(accelerate(net, recompute=recompute), x, c_noise))
    assert all(torch.equal(a, c) for a, c in zip(results[0][1], results[1][1]))


def saved_bytes(net, x, c_noise):
    """Memory held for the backward pass, weights left out."""
    held, weights = {}, {p.untyped_storage().data_ptr() for p in net.parameters()}

    def pack(t):
        if t.untyped_storage().data_ptr() not in weights:
            held[t.untyped_storage().data_ptr()] = t, t.untyped_storage().nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = net.run_model(x, c_noise)
    assert out.requires_grad
    return sum(size for _, size in held.values())


def test_memory_held_for_the_backward_pass():
    """bf16 holds less than half of what fp32 does (its norms and SiLUs are made anew), recomputation less still."""
    x, c_noise = torch.randn([32, 3, 8, 8]), torch.randn([32])
    held = {name: saved_bytes(accelerate(make_net(), **options), x, c_noise) for name, options in {
        'fp32': {}, 'bf16': dict(precision='bf16'), 'recompute': dict(recompute=True)}.items()}
    assert held['bf16'] < 0.5 * held['fp32'] and held['recompute'] < 0.4 * held['fp32'], held


@pytest.mark.parametrize('model_type', NETWORKS)
@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
@pytest.mark.filterwarnings('ignore')  # torch's own, from inside its compiler
def test_one_graph_to_compile(model_type, precision):
    """The whole U-Net is a single graph, forward and backward, whose numbers are those of the network as it is."""
    net = make_net(model_type)
    net.precision = precision
    x, c_noise = torch.randn([2, 3, 8, 8]), torch.randn([2])
    reference = outputs_and_gradients(net, x, c_noise)
    net.model.compile(backend='aot_eager', fullgraph=True, dynamic=False)
    outputs, grads = outputs_and_gradients(net, x, c_noise)
    tolerance = {'fp32': 1e-6, 'bf16': 2e-2}[precision]
    assert distance(outputs, reference[0]) <= tolerance and distance(grads, reference[1]) <= tolerance
    assert copy.deepcopy(net).model._compiled_call_impl is None and set(net.state_dict()) == set(make_net(
        model_type).state_dict())


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('graphs', [False, True])
@pytest.mark.filterwarnings('ignore')  # the compiler's: that TF32 is not used, for one
def test_compiled_on_a_gpu(graphs):
    net = make_net(device='cuda').eval().requires_grad_(False)
    x, sigma = torch.randn([4, 3, 8, 8], device='cuda'), torch.ones([], device='cuda')
    reference = [net(x, sigma * s) for s in (1, 2, 3)]
    accelerate(net, compile=True, cuda_graphs=graphs)
    with torch.no_grad():
        for _ in range(3):
            outputs = [net(x, sigma * s) for s in (1, 2, 3)]
    assert distance(outputs, reference) < 1e-5


@pytest.mark.filterwarnings('ignore')  # torch's own, from inside its compiler
def test_what_is_compiled(monkeypatch):
    """A network compiled by another backend, which needs no C++ compiler, is compiled; copies and stand-ins are not."""
    monkeypatch.setattr(acceleration, 'check_compiler', None)
    net, x, sigma = make_net().eval(), torch.randn([2, 3, 8, 8]), torch.ones([])
    assert not acceleration.is_compiled(net)
    with torch.no_grad():
        reference = net(x, sigma)
        accelerate(net, compile=True, backend='aot_eager')
        assert acceleration.is_compiled(net) and distance([net(x, sigma)], [reference]) < 1e-5
        with acceleration.uncompiled(net), torch._dynamo.config.patch(error_on_recompile=True):
            net(torch.randn([3, 3, 8, 8]), sigma)
    assert not acceleration.is_compiled(copy.deepcopy(net))
    with stand_in(net, CountedModel):
        assert not acceleration.is_compiled(net)


def test_compilers_absence_is_a_sentence(monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError('Unsupported: C++ compiler not found\n  long story')
    monkeypatch.setattr(torch, 'compile', fails)
    with pytest.raises(UserError, match=r'--compile does not work here \(Unsupported: C\+\+ compiler .*g\+\+'):
        acceleration.check_compiler(torch.device('cpu'))


# -- a step without waiting

class Waits(TorchDispatchMode):
    """Lists the operations that read values back, for which the host would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if (name := func.overloadpacket.__name__) in WAITS:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def training_step(name, device):
    """`one_step` of an entry of STEPS, as a function of no arguments."""
    system, kwargs = STEPS[name]
    pipe = AugmentPipe(p=0.5, **TRAIN_AUGMENT)
    with torch.device(device):
        net = make_net(network_class=SYSTEMS[system].network_class, augment_dim=pipe.label_dim, device=device,
                       **kwargs).train()
    ema = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, fused=True)
    images = torch.zeros([4, 3, 8, 8], device=device)
    loss_fn = SYSTEMS[system].make_loss(net)

    return lambda: one_step(net, ema, optimizer, loss_fn, images, None, pipe)


@pytest.fixture
def statistics():
    """No statistics before or after."""
    tl.training_stats._moments.clear()
    yield
    tl.training_stats._moments.clear()


@pytest.mark.parametrize('system', STEPS)
def test_a_step_never_waits(system, statistics):
    """A step reads nothing back, not even in the fused optimiser; tests/test_pretended.py also looks for copies."""
    step = training_step(system, 'cpu')
    step()  # constants such as the DCT's matrix are copied once
    with Waits() as waits:
        step()
    assert waits.found == []


def test_waits_are_found():
    with Waits() as waits:
        torch.ones([]).item()
    assert waits.found == ['_local_scalar_dense']


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('data_device', b.DATA_DEVICES)
@pytest.mark.parametrize('system', STEPS)
@pytest.mark.filterwarnings('ignore:Synchronization debug mode is a prototype')
def test_a_step_never_waits_for_the_gpu(system, data_device, statistics):
    step = training_step(system, 'cuda')
    dataset = tl.open_dataset(path=EMBEDDED, use_labels=True)
    batches = b.Batches(dataset, 8, 0, 0, {}, torch.device('cuda', 0), data_device)
    step(), next(batches)
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode('error')
        for _ in range(3):
            next(batches)
            step()
    finally:
        torch.cuda.set_sync_debug_mode('default')
        batches.close()


@pytest.mark.parametrize('device', DEVICES)
def test_gradients_are_cleaned_alike(device):
    """Cleaning all gradients in one pass gives what cleaning each tensor gives."""
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(5, 2)).to(device)
    for p in net.parameters():
        p.grad = torch.randn_like(p) * 1e6
    assert tl.clean_gradients(net)
    net[0].weight.grad.view(-1)[:3] = torch.tensor([float('nan'), float('inf'), -float('inf')])
    expected = [torch.nan_to_num(p.grad / 8, nan=0, posinf=1e5, neginf=-1e5) for p in net.parameters()]
    assert not tl.clean_gradients(net, loss_scaling=8)
    assert all(torch.equal(p.grad, e) for p, e in zip(net.parameters(), expected))


def test_optimizer_states_move_between_devices():
    """Adam's state from the fused kernels continues with the plain ones to the same numbers, and the reverse."""
    def make(fused):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(5))
        return p, torch.optim.Adam([p], lr=0.1, fused=fused)
    results = []
    for first, second in ((None, None), (True, None), (None, True)):
        p, optimizer = make(first)
        for fused in (first, second):
            later, other = make(fused)
            if optimizer.state:
                load_optimizer(other, optimizer.state_dict())
            with torch.no_grad():
                later.copy_(p)
            p, optimizer = later, other
            assert optimizer.param_groups[0]['fused'] is fused
            p.grad = torch.ones(5)
            optimizer.step()
        results.append(p.detach())
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])


# -- data

@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and decoded files even for small sets."""
    monkeypatch.setenv('DNNLIB_CACHE_DIR', str(tmp_path / 'cache'))
    monkeypatch.setattr(decoded, 'MIN_BYTES', 0)
    return tmp_path / 'cache' / 'decoded'


def decoded_dataset(path=EMBEDDED, **kwargs):
    dataset = ImageFolderDataset(path, **kwargs)
    dataset.use_decoded(decoded.decoded_images(dataset, min_bytes=0))
    return dataset


@pytest.mark.parametrize('kwargs', [{}, dict(use_labels=True), dict(xflip=True, use_labels=True),
                                    dict(max_size=100, xflip=True, random_seed=3)])
def test_decoded_images_are_the_images(cache, kwargs):
    plain, mapped = ImageFolderDataset(EMBEDDED, **kwargs), decoded_dataset(**kwargs)
    assert isinstance(mapped.decoded, np.memmap) and len(list(cache.iterdir())) == 1
    indices = np.random.default_rng(0).integers(len(plain), size=64).tolist()
    for dataset in (plain, mapped):
        images, labels = dataset.batch(indices)
        assert images.dtype == np.uint8 and labels.dtype == np.float32
        for i, image, label in zip(indices, images, labels):
            np.testing.assert_array_equal(image, plain[i][0])
            np.testing.assert_array_equal(label, plain[i][1])
    assert all((mapped[i][0] == plain[i][0]).all() for i in indices)
    with pytest.raises(IndexError):
        mapped.batch([len(mapped)])


@pytest.mark.parametrize('start', [0, 96])
def test_all_ways_give_the_same_batches(cache, start):
    """Worker process, thread, resident tensor: the same images and labels in the same order, bit for bit."""
    def take(dataset, source=b.Batches, **loader_kwargs):
        batches = b.Batches(dataset, 8, 5, start, loader_kwargs, torch.device('cpu'))
        if source is not b.Batches:
            sampler = b.InfiniteSampler(dataset, seed=5, start_idx=start)
            batches._source = source(dataset, sampler, 8, torch.device('cpu'))
        taken = [tuple(t.clone() for t in next(batches)) for _ in range(5)]
        batches.close()
        return taken
    common = dict(use_labels=True, xflip=True)
    reference = take(load_embedded(xflip=True), num_workers=0)
    for taken in (take(load_embedded(xflip=True), num_workers=1), take(decoded_dataset(**common)),
                  take(decoded_dataset(**common), b.resident_batches)):
        assert all(torch.equal(x, y) for p, q in zip(taken, reference) for x, y in zip(p, q))
    assert reference[0][0].dtype == torch.float32 and reference[0][1].sum() == 8


def test_decoded_again_when_the_zip_changes(cache, tmp_path):
    path = tmp_path / 'set.zip'
    shutil.copy(EMBEDDED, path)
    decoded_dataset(path)
    first, = cache.iterdir()
    stamp = first.stat().st_mtime_ns
    decoded_dataset(path)
    assert [f.stat().st_mtime_ns for f in cache.iterdir()] == [stamp]
    os.utime(path, ns=(1, 1))  # as of a copy, on another machine that shares the cache
    decoded_dataset(path)
    assert [f.stat().st_mtime_ns for f in cache.iterdir()] == [stamp]
    with zipfile.ZipFile(EMBEDDED) as old, zipfile.ZipFile(path, 'w') as new:
        for name, source in zip(names := old.namelist(), [names[1], *names[1:]]):
            new.writestr(name, old.read(source))
    decoded_dataset(path)
    second, = cache.iterdir()
    assert second != first
    second.write_bytes(second.read_bytes()[:1000])  # damaged in a way that our writer never leaves
    np.testing.assert_array_equal(decoded_dataset(path).decoded[5], ImageFolderDataset(path)[5][0])


def test_a_file_that_another_rank_has_just_made_stays(cache):
    cache.mkdir(parents=True)
    names = 'set-0123456789ab-old', 'set-0123456789ab-new', 'other-0123456789ab-old'
    former, own, other = (cache / f'{name}.npy' for name in names)
    for path in (former, own, other):
        path.touch()
    decoded._remove_former(own)
    assert set(cache.iterdir()) == {own, other}


def test_images_move_to_the_gpu_before_the_first_step(cache):
    """What prevents it is said by the call itself, not when the first batch is asked for."""
    dataset = load_embedded()
    with pytest.raises(UserError, match='--data-device=cuda needs a data set decoded'):
        b.resident_batches(dataset, b.InfiniteSampler(dataset), 8, torch.device('cpu'))


def test_no_decoded_file_where_it_cannot_be(cache, monkeypatch, capsys, tmp_path):
    """On a full disk, a warning says so and images are read one by one; a damaged image is an error either way."""
    dataset = load_embedded()
    monkeypatch.setattr(decoded.shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(1, 1, 1 << 20))
    assert decoded.decoded_images(dataset, min_bytes=0) is None
    said = capsys.readouterr().out
    assert 'not decoded in advance' in said and 'DNNLIB_CACHE_DIR names the folder' in said
    assert not list(cache.glob('*'))
    assert decoded.decoded_images(dataset, max_bytes=1000) is None
    monkeypatch.undo()
    for i in range(2):
        PIL.Image.new('L', (8, 8)).save(tmp_path / f'{i}.bmp')
    (tmp_path / '1.bmp').write_bytes(b'BM damaged')
    with pytest.raises(UserError, match='1.bmp'):
        decoded.decoded_images(ImageFolderDataset(tmp_path), min_bytes=0)


def test_thread_ends_and_its_errors_surface():
    def items():
        yield from range(3)
        raise UserError('the disk is gone')
    results = b.ahead(items())
    assert list(itertools.islice(results, 3)) == [0, 1, 2]
    with pytest.raises(UserError, match='the disk is gone'):
        next(results)
    endless = b.ahead(itertools.count())
    next(endless)
    endless.close()
    assert not any(thread.name == 'batches' for thread in threading.enumerate())


def test_share_of_waiting_is_recorded(tmp_path, monkeypatch):
    """In every run; a run whose data is not decoded in advance also says it, where it is long."""
    monkeypatch.setattr(b, 'MAX_WAIT', 0)
    for workers, cache in ((0, 1), (1, 0)):
        output = succeed('train.py', *SMALL, f'--outdir={tmp_path / str(cache)}', '--duration=0.00032', '--grid=0',
                         f'--workers={workers}', f'--cache={cache}')
        assert output.count('waited for data') == (not cache), output
        path, = (tmp_path / str(cache)).glob('*/stats.jsonl')
        shares = [line['Timing/data_wait']['mean'] for line in json_lines(path)]
        assert len(shares) == 2 and all(0 < share < 1 for share in shares)


@pytest.mark.parametrize('workers, more', [(0, 1), (1, 2), (2, 4)])
@pytest.mark.filterwarnings('ignore:This DataLoader will create 2 worker processes')  # on a machine with one CPU core
def test_waiting_for_data_is_said_once(cache, capsys, workers, more):
    """The message names the remedy, more loader processes; for decoded data, where there is none, nothing is said."""
    def said(dataset, *shares, **loader_kwargs):
        batches = b.Batches(dataset, 8, 5, 0, loader_kwargs, torch.device('cpu'))
        for share in shares:
            batches.report_wait(share)
        batches.close()
        return capsys.readouterr().out
    plain = load_embedded()
    assert said(plain, 0.019, num_workers=workers) == ''
    sentence = said(plain, 0.251, 0.3, num_workers=workers)
    assert 'waited for data 25%' in sentence and f'--workers={more} (now {workers})' in sentence
    assert sentence.count('\n') == 1
    assert said(decoded_dataset(), 0.9) == ''


def test_a_workers_error_keeps_its_sentence(tmp_path):
    """PyTorch would put the worker's traceback before it."""
    (tmp_path / 'a.png').write_bytes(encode_png(PIL.Image.new('L', (8, 8))))
    (tmp_path / 'b.png').write_bytes(b'no picture')
    for workers in (0, 1):
        batches = b.Batches(ImageFolderDataset(tmp_path), 2, 0, 0, dict(num_workers=workers), torch.device('cpu'))
        with contextlib.closing(batches), pytest.raises(UserError, match='^b.png in .* does not decode as an image'):
            next(batches)


@pytest.mark.parametrize('reason, lost', [
    ('DataLoader worker (pid 7) is killed by signal: Bus error. Try to raise your shared memory limit.', True),
    ('DataLoader worker (pid(s) 7, 8) exited unexpectedly', True), ('shapes do not match', False), ('', False),
    ('Caught ...\nRuntimeError: unable to allocate shared memory(shm) for file </torch_7>: No space left\n', True)])
def test_errors_that_mean_a_lost_worker(reason, lost):
    with pytest.raises(UserError if lost else RuntimeError), b.report_lost_workers():
        raise RuntimeError(reason)


def test_data_device_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    refused(invoke('train.py', '-n', '--data-device=cuda'), '--data-device=cuda needs a GPU')


# -- sampling

def test_writing_goes_on_behind(tmp_path, monkeypatch):
    """Batches are drawn while earlier ones are written, at most QUEUED of them ahead; all are there in the end."""
    count = generated.QUEUED + 8
    drawn, written, ahead, sizes, waiting = [], [], [], [], []

    def batches():
        for i in range(count):
            waiting.append(i - len(sizes))
            drawn.append(i)
            yield [2 * i, 2 * i + 1], torch.zeros([2, 3, 4, 4], dtype=torch.uint8)

    def slow(path, image):
        time.sleep(0.01)
        ahead.append(2 * len(drawn) - len(written))
        written.append(path)
    monkeypatch.setattr(generated, 'save_png', slow)
    generated.write_images(tmp_path, batches(), progress=sizes.append)
    assert len(written) == 2 * count and sizes == [2] * count
    assert max(ahead) > 2 and max(waiting) <= generated.QUEUED


def test_a_failed_write_ends_the_drawing(tmp_path, monkeypatch):
    drawn = []

    def batches():
        for i in range(100):
            drawn.append(i)
            yield [i], torch.zeros([1, 3, 4, 4], dtype=torch.uint8)

    def full(path, image):
        raise UserError(f'could not write {path}: the disk is full')
    monkeypatch.setattr(generated, 'save_png', full)
    with pytest.raises(UserError, match='the disk is full'):
        generated.write_images(tmp_path, batches())
    assert len(drawn) <= generated.QUEUED + 2


def test_default_batch():
    net = make_net()
    assert generation.default_batch(net) == generation.BATCH == 64


# -- benchmarks that count

SMALL_NETWORK = dict(img_resolution=8, model_type='SongUNet', model_channels=16, channel_mult=[1, 2], num_blocks=1)
COUNT = f'''
import contextlib, json, sys
from torch._subclasses.fake_tensor import FakeTensorMode
from tests.benchmarks.bench_memory import WAYS, peak_of
with FakeTensorMode() if sys.argv[1] == 'fake' else contextlib.nullcontext():
    print(json.dumps({{name: peak_of(*way, {SMALL_NETWORK}, 4) for name, way in WAYS.items()}}))
'''


def test_memory_is_counted_as_real_tensors_would_have_it():
    """bench_memory.py's tensors without values live as long as real ones; 16 bytes per parameter stay between steps."""
    fake, real = (json.loads(subprocess.run([sys.executable, '-c', COUNT, kind], cwd=ROOT, capture_output=True,
                                            text=True, check=True).stdout) for kind in ('fake', 'real'))
    net = SYSTEMS['edm'].network_class(img_channels=3, augment_dim=9, **SMALL_NETWORK)
    weights = sum(p.numel() for p in net.parameters())
    for way, (between, peak) in real.items():
        assert fake[way] == [pytest.approx(between, rel=0.01), pytest.approx(peak, rel=0.01)], way
        assert 16 * weights < between < 1.1 * 16 * weights < peak, way


def test_a_set_larger_than_a_copy_moves_whole(cache, monkeypatch):
    monkeypatch.setattr(b, 'COPY_IMAGES', 500)
    dataset = decoded_dataset()
    np.testing.assert_array_equal(b._to_gpu(dataset, torch.device('cpu')).numpy(), dataset.decoded)


@pytest.mark.parametrize('name', ['set[1]', 'set*'])
def test_former_files_of_a_name_with_brackets_go(cache, name):
    cache.mkdir(parents=True)
    former, own, other = (cache / f'{stem}.npy' for stem in (f'{name}-0123456789ab-old', f'{name}-0123456789ab-new',
                                                             'set1-0123456789ab-old'))
    for path in (former, own, other):
        path.touch()
    decoded._remove_former(own)
    assert set(cache.iterdir()) == {own, other}


# -- threads and processes that load data

def test_waiting_is_counted_once(monkeypatch):
    """All batches since the last question count, and those before it no more."""
    monkeypatch.setattr(b, 'time', types.SimpleNamespace(perf_counter=itertools.count().__next__))  # 1 s a look
    batches = b.Batches(load_embedded(), 8, 5, 0, {}, torch.device('cpu'))
    for _ in range(3):
        next(batches)
    assert (batches.take_wait(), batches.take_wait()) == (3, 0)


def test_processes_are_advised_where_none_were_asked_for(capsys):
    """The loader's arguments may leave their number to PyTorch, whose default is none."""
    b.Batches(load_embedded(), 8, 5, 0, {}, torch.device('cpu')).report_wait(0.5)
    assert '--workers=1 (now 0)' in capsys.readouterr().out


def test_closed_batches_leave_no_thread(cache):
    batches = b.Batches(decoded_dataset(), 8, 5, 0, {}, torch.device('cpu'))
    next(batches)
    batches.close()
    assert not any(thread.name == 'batches' for thread in threading.enumerate())


def test_the_thread_stays_within_its_depth():
    """Otherwise an epoch would fill the memory."""
    far = threading.Event()

    def items():
        for i in itertools.count():
            if i == 10:
                far.set()
            yield i
    results = b.ahead(items(), depth=2)
    next(results)
    went_far = far.wait(0.2)
    results.close()
    assert not went_far


def test_loading_leaves_the_training_noise_alone():
    before = torch.get_rng_state()
    batches = b.Batches(load_embedded(), 8, 5, 0, {}, torch.device('cpu'))
    next(batches)
    assert torch.equal(torch.get_rng_state(), before)


class IgnoredSignals(torch.utils.data.Dataset):
    """Images whose label says whether the process that loads them ignores SIGUSR1 and leaves shared memory alone."""

    decoded = None

    def __len__(self):
        return 100

    def __getitem__(self, i):
        return np.zeros([3, 8, 8], np.uint8), np.float32([signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN,
                                                                    gc.get_freeze_count() > 0])


@pytest.mark.parametrize('workers', [0, 1])
def test_loader_processes_are_shielded_from_signals(workers):
    """They leave a request to stop to their rank, which without processes stays able to hear it.

    Nor do their garbage collections write to, and so copy, what they share with it.
    """
    batches = b.Batches(IgnoredSignals(), 8, 5, 0, dict(num_workers=workers), torch.device('cpu'))
    _, labels = next(batches)
    batches.close()
    assert (labels == workers).all()


def test_batches_on_a_gpu_that_is_not_there(cache, monkeypatch):
    """From Python, without the command's own check, they are refused as well, not kept on the CPU in silence."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(UserError, match='--data-device=cuda needs a GPU'):
        b.Batches(decoded_dataset(), 8, 5, 0, {}, torch.device('cpu'), 'cuda')


def test_a_set_that_would_take_most_of_the_gpu(cache, monkeypatch):
    dataset = decoded_dataset()
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device: (2 * dataset.decoded.nbytes - 1, 1 << 40))
    with pytest.raises(UserError, match='more than half of the free memory of the GPU; leave --data-device=cuda out'):
        b._to_gpu(dataset, torch.device('cuda'))


# -- the file of decoded images

def test_sets_of_one_name_have_a_file_each(cache, tmp_path, monkeypatch):
    """A relative path, too, stands for another set in another folder."""
    for name in ('a', 'b'):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        shutil.copy2(EMBEDDED, 'set.zip')  # of the same size and age
        decoded_dataset('set.zip')
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize('damage', [
    lambda path, images: path.write_bytes(b''), lambda path, images: np.save(path, images[:2] * 0),
    lambda path, images: np.save(path, np.zeros(images.shape, np.float32))])
def test_a_file_that_is_not_the_decoded_set_is_made_anew(damage, cache):
    images = np.array(decoded_dataset().decoded)
    path, = cache.iterdir()
    damage(path, images)
    np.testing.assert_array_equal(decoded_dataset().decoded[5], load_embedded()[5][0])


def test_decoded_images_are_read_only(cache):
    """All processes share the file, and later runs too."""
    with pytest.raises(ValueError, match='read-only'):
        decoded_dataset().decoded[0] = 0


def test_a_former_file_that_cannot_be_deleted(cache, monkeypatch):
    """Another rank may have been quicker, or the folder may be another user's."""
    cache.mkdir(parents=True)
    former, own = (cache / f'set-0123456789ab-{name}.npy' for name in ('old', 'new'))
    former.touch()

    def refuse(path):
        raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr(pathlib.Path, 'unlink', refuse)
    decoded._remove_former(own)


def test_a_set_with_a_long_name_is_decoded_too(cache, tmp_path):
    path = tmp_path / f'{"x" * 245}.zip'
    shutil.copy(EMBEDDED, path)
    assert isinstance(decoded_dataset(path).decoded, np.memmap)


# -- how a network is told to run

def test_the_layout_follows_the_networks_own_precision(monkeypatch):
    monkeypatch.setattr(acceleration, 'wants_channels_last', lambda device, precision, compile: precision == 'bf16')
    net = make_net()
    net.precision = 'bf16'
    assert accelerate(net).model.memory_format == torch.channels_last


def test_recomputation_can_be_switched_off_again():
    net = accelerate(make_net(), recompute=True)
    assert net.model.recompute and not accelerate(net).model.recompute


def test_recomputation_where_it_would_have_no_effect(monkeypatch):
    net = make_net()
    monkeypatch.setattr(type(net.model), 'can_recompute', False)
    with pytest.raises(UserError, match='leave out --checkpoint-activations'):
        accelerate(net, recompute=True)


def test_a_compiler_is_tried_before_the_network(monkeypatch):
    """Its absence is a sentence from `accelerate`, not a traceback from the first step."""
    def fails(*args, **kwargs):
        raise AssertionError  # as some of PyTorch's checks do, without a word
    monkeypatch.setattr(torch, 'compile', fails)
    with pytest.raises(UserError, match=r'--compile does not work here \(AssertionError\)'):
        accelerate(make_net(), compile=True)


@pytest.mark.parametrize('before, after', [(8, 32), (100, 100)])
def test_room_for_every_input_shape(before, after):
    """A network is compiled for 32 shapes at least; a limit that the user has set higher stays."""
    with torch._dynamo.config.patch(cache_size_limit=before):
        accelerate(make_net(), compile=True, backend='aot_eager')
        assert torch._dynamo.config.cache_size_limit == after
