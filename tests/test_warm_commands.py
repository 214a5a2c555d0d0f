"""Warm through the commands and the library: every way to train it, and what may be drawn from the result."""

import json
import re

import numpy as np
import PIL.Image
import pytest
import torch

import warm
from dnnlib import UserError
from dnnlib.files import file_sha256
from tests.commands import SMALL, invoke, refused, run_command, succeed
from tests.warm_examples import warm_net
from training.dataset import EMBEDDED
from training.pixels import to_uint8
from training.provenance import code_version
from training.samplers import StackedRandomGenerator
from training.snapshot import read_snapshot, save_snapshot
from warm.systems import SYSTEMS
from warm.targets import TARGETS

# Flags of train.py → paths that the network then knows, and some that it doesn't, as flags of generate.py.
WAYS = {
    '--bnr=0.5': (['--bnr=0.5'], ['--bnr=0.4', '--bnr=0', '--bnr-schedule=blurring']),
    '--bnr=0': (['--bnr=0', '--bnr=0 --solver=dpmpp2m'], ['--bnr=0.5']),
    '--bnr=0,0.1,1': (['--bnr=0', '--bnr=0.1', '--bnr=1'], ['--bnr=0.5', '--bnr=2']),
    '--bnr=0.1-2': (['--bnr=0.1', '--bnr=0.73', '--bnr=2'], ['--bnr=0', '--bnr=0.09', '--bnr=2.1',
                                                           '--bnr-schedule=blurring:4']),
    '--bnr-schedule=blurring:5': (['--bnr-schedule=blurring:5'], ['--bnr-schedule=blurring:4', '--bnr=0.5']),
    '--bnr=auto': (['--bnr=0.13'], ['--bnr=0.5']),
    **{f'--targets={name}': (['--bnr=0.5', '--bnr=0.5 --solver=dpmpp2m', '--solver=euler --eta=1'], [])
       for name in TARGETS},
}


def train(folder, *flags):
    """Train a small network for two steps, in this process; returns its snapshot."""
    out = invoke('train.py', *SMALL, f'--outdir={folder}', '--nosubdir', '--precond=warm', '--duration=0.000032',
                 '--seed=0', *flags)
    assert out.exit_code == 0, out.output
    return max(folder.glob('network-snapshot-*.safetensors'))


@pytest.mark.parametrize('flags', WAYS)
def test_train_and_generate(tmp_path, flags):
    knows, refuses = WAYS[flags]
    network = train(tmp_path / 'run', flags)
    for i, path in enumerate(knows):
        out = invoke('generate.py', f'--network={network}', f'--outdir={tmp_path / str(i)}', '--seeds=0-1', '--steps=3',
                     *path.split())
        assert out.exit_code == 0, out.output
        assert len(list((tmp_path / str(i)).glob('*.png'))) == 2
    for path in refuses:
        refused(invoke('generate.py', f'--network={network}', f'--outdir={tmp_path / "x"}', path), 'this network knows')
    assert (tmp_path / 'run' / 'process000000.png').is_file()


def test_auto_is_recorded(tmp_path):
    """--bnr=auto is replaced by the measured BNR, in the options and in the snapshot."""
    network = train(tmp_path, '--bnr=auto')
    options = json.loads((tmp_path / 'training_options.json').read_text())
    assert options['network_kwargs']['bnr'] == read_snapshot(network).network_kwargs['bnr'] == '0.13'


def test_options_that_exclude_each_other():
    refused(invoke('train.py', '-n', '--precond=warm', '--bnr=0.5', '--bnr-schedule=blurring'), 'give one')
    refused(invoke('train.py', '-n', '--precond=warm', '--bnr-schedule=cosine'), "'cosine'", 'constant, blurring')
    refused(invoke('train.py', '-n', '--precond=warm', '--bnr-schedule=blurring:-1'), '-1')
    refused(invoke('train.py', '-n', '--precond=warm', '--bnr=0.5,x'), "'x'")


def test_a_refused_schedule_says_what_its_bnr_is():
    net = SYSTEMS['warm'].network_class(8, 1, model_type='SongUNet', model_channels=8, channel_mult=[1], bnr='0.1-2')
    with pytest.raises(UserError, match='not blurring schedule up to 20 pixels, whose BNR goes from 0.04 to 10'):
        SYSTEMS['warm'].make_sampler(net, {'bnr_schedule': 'blurring'})


def test_library(tmp_path):
    """The README's example: `sample` draws what generate.py writes, and D + R is the network's prediction."""
    network = train(tmp_path / 'run', '--cond=1')
    net = warm.load(network)
    images = warm.sample(net, seeds=range(5), batch=2, num_steps=3)
    assert images.shape == (5, 1, 8, 8) and images.dtype == torch.uint8
    assert invoke('generate.py', f'--network={network}', f'--outdir={tmp_path / "out"}', '--seeds=0-4', '--steps=3',
                  '--batch=5').exit_code == 0
    for seed in range(5):
        with PIL.Image.open(tmp_path / 'out' / f'{seed:06d}.png') as picture:
            assert np.abs(np.asarray(picture).astype(int) - images[seed, 0].numpy()).max() <= 1
    noisy = torch.randn(3, 1, 8, 8)
    D, R = net.denoise_deblur(noisy, sigma=0.5, alpha=0.25)
    assert D.shape == R.shape == noisy.shape
    torch.testing.assert_close(net(noisy, 0.5, alpha=0.25), D + R)
    with pytest.raises(UserError, match='classes 0 to 9'):
        warm.sample(net, [0], class_idx=10)
    with pytest.raises(UserError, match='^discretization is not an option'):
        warm.sample(net, [0], discretization='vp')
    with pytest.raises(UserError, match='no file'):
        warm.load(tmp_path / 'none.safetensors')


def test_only_who_names_no_data_is_told_of_the_digits():
    """A preset names what it trains on; without one, the defaults are for larger images."""
    for flags, told in (['--cbase=8'], True), (['--preset=digits'], False), ([f'--data={EMBEDDED}'], False):
        assert ('No --data given' in succeed('train.py', '-n', *flags)) == told


def test_a_method_outside_the_repository(tmp_path, root):
    """The README's script, as it stands there, trains its method and draws from it."""
    script = re.search(r'```python\n(# shifted\.py.*?)```', (root / 'README.md').read_text(), re.DOTALL)[1]
    (tmp_path / 'shifted.py').write_text(script)

    def run(*args):
        return run_command(tmp_path / 'shifted.py', *args, env={'PYTHONPATH': str(root)})
    trained = run('train', '--precond=shifted', f'--outdir={tmp_path / "run"}', '--nosubdir', '--duration=0.000016',
                  *SMALL)
    assert 'System:                  shifted' in trained.stdout
    snapshot = tmp_path / 'run' / 'network-snapshot-000000.safetensors'
    run('generate', f'--network={snapshot}', f'--outdir={tmp_path / "out"}', '--seeds=0', '--steps=2')
    assert (tmp_path / 'out' / '000000.png').is_file()
    assert '2 images of digits-8x8' in run('warm.errors', f'--network={snapshot}', '--num=2').stdout
    assert 'with 0 measurement(s) of 1 run(s)' in run('warm.report.page', tmp_path / 'run',
                                                     f'--outdir={tmp_path / "report"}').stdout
    refused(invoke('generate.py', f'--network={snapshot}', f'--outdir={tmp_path / "out"}', '--seeds=0'),
            "is of the system 'shifted', which this version does not know", 'If a script of yours defines it')


LAZY = """
import dataclasses
from training.system import Option
from warm.samplers import SOLVERS
from warm.steps import Solver, transition
from warm.systems import SYSTEMS

PULL = Option('pull', 1.0, 'How far a step goes', type=float)

def lazy(denoise, x, D, R, here, there, z, memory, pull):
    return x + pull * (transition(x, D, R, here, there) - x)

SOLVERS['lazy'] = Solver(lazy, order=None, options=(PULL,))
SYSTEMS['warm'] = dataclasses.replace(
    SYSTEMS['warm'], own_sample_options=(*SYSTEMS['warm'].own_sample_options, PULL))

if __name__ == '__main__':
    from generate import main
    main()
"""


def test_a_solver_with_options_outside_the_repository(tmp_path, root):
    """Its option is a flag, which the solver receives: at 0, a step goes nowhere, and the images are the noise."""
    (tmp_path / 'lazy.py').write_text(LAZY)
    save_snapshot(tmp_path / 'network.safetensors', warm_net(), 'warm', kimg=1)

    def generate(seeds, *flags):
        return run_command(tmp_path / 'lazy.py', f'--network={tmp_path}/network.safetensors', f'--outdir={tmp_path}',
                           f'--seeds={seeds}', '--steps=2', '--solver=lazy', '--pull=0', *flags,
                           env={'PYTHONPATH': str(root)}).stdout
    generate('3')
    noise = 80 * StackedRandomGenerator('cpu', [3]).randn([1, 3, 8, 8])
    np.testing.assert_array_equal(PIL.Image.open(tmp_path / '000003.png'), to_uint8(noise)[0].permute(1, 2, 0))

    # The record names the script by its content, and images by another version of it do not join without a word.
    version = json.loads((tmp_path / 'generation.json').read_text())['commit']
    assert version == f'{code_version()}+lazy.py@{file_sha256(tmp_path / "lazy.py")[:12]}'
    (tmp_path / 'lazy.py').write_text(LAZY.replace('x + pull', 'x + 2 * pull'))
    assert f'were begun by version {version} of the code, and this is' in generate('3,4')
    generate('3,4', '--overwrite')
    assert json.loads((tmp_path / 'generation.json').read_text())['commit'] != version


def test_library_with_edm(root):
    net = warm.load(root / 'tests/golden/edm-network-snapshot-000123.pkl')
    assert net.system == 'edm'
    assert warm.sample(net, [1, 2], class_idx=3, num_steps=2).shape == (2, 3, 16, 16)


def test_transfer_of_less_than_half(tmp_path):
    """Every matching tensor is copied, even into a deeper network with more than twice as many."""
    import training.training_loop as loop
    kwargs = dict(img_resolution=8, img_channels=1, model_channels=16, channel_mult=[1])
    parent, child = (SYSTEMS['edm'].network_class(**kwargs, model_type='SongUNet', num_blocks=n) for n in (1, 6))
    save_snapshot(tmp_path / 'network-snapshot-000001.safetensors', parent, 'edm')
    copied = loop.transfer_weights(tmp_path / 'network-snapshot-000001.safetensors', child)
    source, result = parent.state_dict(), child.state_dict()
    alike = [name for name in result if name in source and source[name].shape == result[name].shape]
    assert copied == len(alike) < len(result) / 2
    assert all(torch.equal(source[name], result[name]) for name in alike)


def test_transfer_keeps_the_classes(tmp_path, root):
    """From EDM's class-conditional .pkl: at BNR 0 the Warm network draws its parent's images, class by class."""
    import training.training_loop as loop
    from warm.precond import WarmPrecond
    parent = warm.load(root / 'tests/golden/edm-network-snapshot-000123.pkl')
    child = WarmPrecond(**{**parent.init_kwargs, 'bnr': '0,0.5'})
    loop.transfer_weights(root / 'tests/golden/edm-network-snapshot-000123.pkl', child)
    child = child.eval().requires_grad_(False)
    child.system = 'warm'
    for class_idx in (0, 7):
        ours = warm.sample(child, range(3), class_idx=class_idx, num_steps=3, bnr='0')
        theirs = warm.sample(parent, range(3), class_idx=class_idx, num_steps=3)
        assert torch.equal(ours, theirs)


def test_data_is_named_when_it_is_the_default(tmp_path):
    out = invoke('train.py', '-n')
    assert 'embedded handwritten digits' in out.output and '--source=cifar10' in out.output
    assert EMBEDDED in out.output
    assert 'digits' not in invoke('train.py', '-n', '--precond=warm', '--bnr=-1').output
