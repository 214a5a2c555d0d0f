"""The library: its arguments, and where systems that start from training images get them (see test_warm_commands)."""

import shutil
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import torch

import warm
from dnnlib import UserError
from tests.commands import invoke, refused
from tests.small_networks import tiny_network
from training.dataset import EMBEDDED
from training.snapshot import save_snapshot
from training.training_loop import facts
from warm.precond import WarmPrecond
from warm.systems import SYSTEMS
from warm.starts import TrainingImages

SHORT = {'cold': dict(cold_steps=3), 'ihdm': dict(ihdm_levels=3)}
STARTED = [name for name, system in SYSTEMS.items() if system.starts_from_data]


def test_all_systems_that_start_from_images_are_tested():
    assert set(STARTED) == set(SHORT)


def snapshot_of(name, path, dataset):
    """Save an untrained network as if it had been trained on `dataset`; returns the file."""
    save_snapshot(path, tiny_network(name, **SHORT[name]), name, dataset=dataset, kimg=1)
    return path


def digits():
    return facts(TrainingImages(EMBEDDED, net=type('Net', (), dict(
        label_dim=0, img_channels=1, img_resolution=8))).dataset)


@pytest.mark.parametrize('name', STARTED)
def test_embedded_digits_need_not_be_named(name, tmp_path):
    """A network trained on the embedded digits starts from them by default; generate.py writes the same images."""
    network = snapshot_of(name, tmp_path / 'network.safetensors', digits())
    net = warm.load(network)
    images = warm.sample(net, range(4))
    assert torch.equal(images, warm.sample(net, range(4), data=EMBEDDED))
    assert invoke('generate.py', f'--network={network}', f'--outdir={tmp_path / "out"}', '--seeds=0-3').exit_code == 0
    for seed in range(4):
        with PIL.Image.open(tmp_path / 'out' / f'{seed:06d}.png') as picture:
            assert np.abs(np.asarray(picture).astype(int) - images[seed, 0].numpy()).max() <= 1


def test_images_do_not_depend_on_the_default_type(tmp_path):
    """A program may have set PyTorch's default dtype to float64."""
    torch.manual_seed(0)
    net = WarmPrecond(img_resolution=8, img_channels=1, model_type='SongUNet', model_channels=8, channel_mult=[1],
                      num_blocks=1, attn_resolutions=[]).eval()
    images = warm.sample(net, range(4), system='warm', num_steps=3)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(warm.sample(net, range(4), system='warm', num_steps=3), images)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_network_in_training_mode():
    """Sampling applies no dropout and leaves every module's mode as it was, even where only a part is training."""
    torch.manual_seed(0)
    net = WarmPrecond(img_resolution=8, img_channels=1, model_type='SongUNet', model_channels=8, channel_mult=[1],
                      num_blocks=1, attn_resolutions=[], dropout=0.5)
    with torch.no_grad():
        for p in net.parameters():  # some start as zeros, which would hide dropout
            p.add_(0.05 * torch.randn_like(p))
    known = warm.sample(net.eval(), [0, 1], system='warm', num_steps=2)
    net.train()
    net.model.dec.eval()
    modes = [module.training for module in net.modules()]
    assert torch.equal(warm.sample(net, [0, 1], system='warm', num_steps=2), known)
    assert [module.training for module in net.modules()] == modes and len(set(modes)) == 2


@pytest.mark.parametrize('name', STARTED)
def test_other_data_sets_have_to_be_named(name, tmp_path):
    """The message names the data set and the argument `data`, which makes it work; a set of another size is refused."""
    dataset = dict(digits(), name='photographs', num_images=3)
    net = warm.load(snapshot_of(name, tmp_path / 'network.safetensors', dataset))
    with pytest.raises(UserError, match=r'\(photographs\), as in sample\(net, seeds, data=') as e:
        warm.sample(net, [0])
    assert '\n' not in str(e.value) and '--data' not in str(e.value)
    with pytest.raises(UserError, match='has 1797 images'):
        warm.sample(net, [0], data=EMBEDDED)
    folder = tmp_path / 'photographs'
    folder.mkdir()
    for i in range(3):
        PIL.Image.fromarray(np.full([8, 8], 80 * i, np.uint8)).save(folder / f'{i}.png')
    assert warm.sample(net, range(2), data=folder).shape == (2, 1, 8, 8)


@pytest.mark.parametrize('name', STARTED)
def test_snapshot_without_facts(name, tmp_path):
    net = warm.load(snapshot_of(name, tmp_path / 'network.safetensors', {}))
    with pytest.raises(UserError, match=r'\(unknown\)'):
        warm.sample(net, [0])


def test_networks_without_a_file(tmp_path):
    """A network that was not loaded from a file takes its images from `data`, and asks for it."""
    net = warm.load(snapshot_of('cold', tmp_path / 'network.safetensors', digits()))
    known = warm.sample(net, [0])
    del net.snapshot
    assert torch.equal(warm.sample(net, [0], data=EMBEDDED), known)
    with pytest.raises(UserError, match='data'):
        warm.sample(net, [0])


def test_networks_of_ones_own(tmp_path):
    """A network trained in this process does not say which system it belongs to, so the caller must."""
    net = warm.load(snapshot_of('cold', tmp_path / 'network.safetensors', digits()))
    known = warm.sample(net, [0])
    del net.snapshot, net.system
    for system in ('cold', SYSTEMS['cold']):
        assert torch.equal(warm.sample(net, [0], data=EMBEDDED, system=system), known)
    with pytest.raises(UserError, match="does not say which system it belongs to; .* system='warm'"):
        warm.sample(net, [0])
    with pytest.raises(UserError, match="there is no system 'hot'; .* edm"):
        warm.sample(net, [0], system='hot')


def test_what_a_start_imports(root):
    """Loading a network and sampling from it import nothing that takes seconds, like PyTorch's compiler or SciPy."""
    program = """if True:
        import sys, warm
        warm.sample(warm.load('tests/golden/edm-network-snapshot-000123.pkl', 'cpu'), [0], num_steps=2)
        print([name for name in ('torch._dynamo', 'scipy', 'requests', 'matplotlib') if name in sys.modules])"""
    done = subprocess.run([sys.executable, '-c', program], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == '[]\n'


def test_data_is_no_option_of_other_systems(root):
    net = warm.load(root / 'tests/golden/edm-network-snapshot-000123.pkl')
    assert net.snapshot.system == net.system == 'edm' and not net.snapshot.state_dict
    with pytest.raises(UserError, match='^data is not an option'):
        warm.sample(net, [1], data=EMBEDDED)


@pytest.mark.parametrize('seeds, options, said', [
    ([], {}, 'no seeds were given'), ('0-3', {}, 'the seeds 0-3 are not integers'), (3, {}, 'not integers'),
    ([0.5], {}, 'not integers'), ([1], {'batch': 0}, 'batch is 0'),
    ([1], {'batch': 2.5}, 'batch is 2.5'),
    ([1], {'steps': 2}, '^steps is not an option .* it takes num_steps, sigma_min'),
    ([1], {'class_idx': 99}, '^class_idx=99 is out of range'),
    ([1, 2, 1], {}, '^the seed 1 occurs twice in the seeds, '), ([3, -1], {}, '^the seed -1 is negative; '),
    ([1], {'num_steps': 10 ** 6}, '^num_steps=1000000 is more than the 10000 steps'),
])
def test_bad_input(root, seeds, options, said):
    """The messages name keyword arguments, not flags."""
    net = warm.load(root / 'tests/golden/edm-network-snapshot-000123.pkl')
    with pytest.raises(UserError, match=said) as e:
        warm.sample(net, seeds, **options)
    assert '--' not in str(e.value)


@pytest.mark.parametrize('device', ['gpu', 'cuda', 'cuda:99', '', 3.5, 'cpu:x'])
def test_devices_that_are_not_there(root, monkeypatch, device):
    if device == 'cuda' and torch.cuda.is_available():
        pytest.skip('there is a GPU')
    with pytest.raises(UserError, match=f"this machine has no device '{device}' for PyTorch; give 'cpu'") as e:
        warm.load(root / 'tests/golden/edm-network-snapshot-000123.pkl', device=device)
    assert '\n' not in str(e.value)


def test_device_by_name(root):
    net = warm.load(root / 'tests/golden/edm-network-snapshot-000123.pkl', device='cpu')
    assert next(net.parameters()).device.type == 'cpu'


def test_seeds_of_any_kind(root):
    net = warm.load(root / 'tests/golden/edm-network-snapshot-000123.pkl')
    images = [warm.sample(net, seeds, num_steps=1) for seeds in ([0, 1], range(2), np.arange(2), torch.arange(2))]
    assert all(torch.equal(x, images[0]) for x in images)


def test_the_same_data_set_elsewhere_continues_a_folder(tmp_path):
    """generate.py compares the images that the sampler starts from, not their path."""
    network = snapshot_of('cold', tmp_path / 'network.safetensors', dict(digits(), name='photographs', num_images=3))
    for name, shift in (('here', 0), ('there', 0), ('others', 1)):
        (tmp_path / name).mkdir()
        for i in range(3):
            PIL.Image.fromarray(np.full([8, 8], 80 * i + shift, np.uint8)).save(tmp_path / name / f'{i}.png')
    base = ['generate.py', f'--network={network}', f'--outdir={tmp_path / "out"}']
    assert invoke(*base, '--seeds=0-1', f'--data={tmp_path / "here"}').exit_code == 0
    assert invoke(*base, '--seeds=2', f'--data={tmp_path / "there"}').exit_code == 0
    refused(invoke(*base, '--seeds=3', f'--data={tmp_path / "others"}'), 'other options')
    shutil.rmtree(tmp_path / 'here')
    refused(invoke(*base, '--seeds=3', f'--data={tmp_path / "there"}'), 'other options')
