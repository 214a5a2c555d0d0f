"""The fid.py command: real runs with the pixel detector, and its answers to bad input."""

import http.server
import io
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
import warnings
import zipfile

import click.testing
import numpy as np
import PIL.Image
import psutil
import pytest
import requests
import torch

import fid
from dnnlib import UserError
from tests.commands import READ_ONLY, ROOT, SMALL, json_lines, refused, run_command, succeed, torchrun
from tests.commands import invoke as invoke_script
from training import metric_collectors, metrics, scoring
from training.detectors import PixelDetector
from training.metric_images import image_batches, open_images
from training.metric_resume import Unfinished
from training.snapshot import save_snapshot
from warm.precond import WarmPrecond

pytestmark = pytest.mark.usefixtures('cache')


def write_images(folder, n, seed=0, size=16, channels=3):
    """Write n PNGs of random 4×4 blocks, whose colours the seed shifts; returns the folder."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        x = rng.integers(0, 256 - 20 * seed, [4, 4, channels], dtype=np.uint8).repeat(size // 4, 0).repeat(size // 4, 1)
        PIL.Image.fromarray(x[:, :, 0] if channels == 1 else x).save(folder / f'{i:06d}.png')
    return folder


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp('images')
    return write_images(base / 'real', 60), write_images(base / 'generated', 50, seed=1)


@pytest.fixture(scope='module')
def reference(folders, tmp_path_factory):
    dest = tmp_path_factory.mktemp('refs') / 'ref.npz'
    invoke('ref', data=folders[0], dest=dest, metrics='fid,pr')
    return dest


def run(command, detector='pixels', **options):
    """Run fid.py in this process; returns click's result."""
    args = [f'--{k}={v}' for k, v in {**options, 'detector': detector}.items()]
    return click.testing.CliRunner().invoke(fid.main, [command, *args])


def invoke(command, **options):
    result = run(command, **options)
    assert result.exit_code == 0, result.output
    return result.output


def fails(command, message, **options):
    """Assert that the command ends with exit code 1 and a one-line error, without a traceback."""
    result = run(command, **options)
    errors = [line for line in result.output.splitlines() if line.startswith('Error: ')]
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), (result.output, result.exception)
    assert len(errors) == 1 and re.search(message, errors[0]), result.output


def pixel_statistics(folder, n):
    """(mu, sigma) of n images' pixel features, by NumPy alone."""
    x = np.stack([np.asarray(PIL.Image.open(folder / f'{i:06d}.png')) for i in range(n)]) / 127.5 - 1
    x = x.reshape(n, 8, 2, 8, 2, 3).mean(axis=(2, 4)).transpose(0, 3, 1, 2).reshape(n, -1)
    return x.mean(axis=0), np.cov(x.T)


def launch(root, *args, ranks=None):
    """Run fid.py as a user does; returns {name: score} as printed."""
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    torchrun = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}', '--'] if ranks else []
    done = subprocess.run([sys.executable, *torchrun, 'fid.py', *args], cwd=root, env=env, capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return dict(line.split(': ') for line in done.stdout.splitlines() if re.fullmatch(r'\S+: \S+', line))


def test_two_commands_give_the_plain_number(root, folders, tmp_path):
    """`fid.py ref` and `fid.py calc`, as in EDM, give the distance of the plain formula; two ranks change no digit."""
    real, generated = folders
    dest = tmp_path / 'deep' / 'ref.npz'
    launch(root, 'ref', f'--data={real}', f'--dest={dest}', '--detector=pixels', '--metrics=fid,pr', '--batch=7')
    mu, sigma = pixel_statistics(real, 60)
    with np.load(dest) as z:
        np.testing.assert_allclose(z['mu'], mu, atol=1e-6)
        np.testing.assert_allclose(z['sigma'], sigma, atol=1e-6)
        assert z['mu'].dtype == z['sigma'].dtype == np.float64
    args = ['calc', f'--images={generated}', f'--ref={dest}', '--num=50', '--detector=pixels', '--metrics=fid,pr']
    one = launch(root, *args)
    assert list(one) == ['FD-pixels', 'precision-pixels', 'recall-pixels']
    mu_g, sigma_g = pixel_statistics(generated, 50)
    root_trace = np.sqrt(np.linalg.eigvals(sigma_g @ sigma).clip(0).real).sum()
    plain = np.square(mu - mu_g).sum() + np.trace(sigma) + np.trace(sigma_g) - 2 * root_trace
    assert float(one['FD-pixels']) == pytest.approx(plain, rel=1e-4)  # the plain root loses digits: rank 48 of 192
    assert launch(root, *args, '--batch=16', ranks=2) == one


def test_number_does_not_depend_on_the_batch(folders, reference):
    outputs = {invoke('calc', images=folders[1], ref=reference, num=50, batch=b, metrics='fid,pr') for b in (1, 7, 64)}
    assert len(outputs) == 1


def test_seed_chooses_the_subset(folders, reference):
    lines = [invoke('calc', images=folders[1], ref=reference, num=20, seed=s).splitlines()[-1] for s in (0, 0, 1)]
    assert lines[0] == lines[1] != lines[2]


def test_edm_statistics_are_read(folders, tmp_path):
    mu, sigma = pixel_statistics(folders[0], 60)
    np.savez(tmp_path / 'edm.npz', mu=mu, sigma=sigma)
    assert 'FD-pixels: ' in invoke('calc', images=folders[1], ref=tmp_path / 'edm.npz', num=50)


def test_same_images_have_distance_zero(folders, reference):
    assert float(invoke('calc', images=folders[0], ref=reference, num=60).split()[-1]) < 1e-10


def test_grey_images_score(tmp_path):
    write_images(tmp_path / 'grey', 20, channels=1)
    invoke('ref', data=tmp_path / 'grey', dest=tmp_path / 'grey.npz')
    with np.load(tmp_path / 'grey.npz') as z:
        np.testing.assert_array_equal(z['mu'][:64], z['mu'][64:128])


def test_batches_keep_the_order(folders):
    dataset = open_images(folders[0])
    batches = list(image_batches(dataset, range(5, 58), 8))
    assert [len(b) for b in batches] == [8] * 6 + [5]
    expected = torch.from_numpy(np.stack([dataset[i][0] for i in range(5, 58)]))
    assert torch.equal(torch.cat(batches), expected)


# -- straight from a network

class Scripted(torch.nn.Module):
    """Three features and three probabilities per image."""

    def forward(self, x, return_features: bool = False, no_output_bias: bool = False):
        y = (x.float() * torch.arange(1, 1 + x.shape[3], device=x.device)).mean(dim=[2, 3]).sin()
        return y if return_features else y.softmax(dim=1)


@pytest.fixture(scope='module')
def network(tmp_path_factory):
    """Snapshot of a small conditional Warm network with random weights."""
    torch.manual_seed(0)
    net = WarmPrecond(img_resolution=8, img_channels=3, label_dim=4, bnr='0.5', model_type='SongUNet', model_channels=8,
                      channel_mult=[1, 1], num_blocks=1)
    for parameter in net.parameters():  # output layers start near zero; make every weight count
        torch.nn.init.normal_(parameter, std=0.1)
    path = tmp_path_factory.mktemp('run') / 'network-snapshot-000003.safetensors'
    save_snapshot(path, net.eval(), 'warm', kimg=3.5, dataset=dict(name='colours'))
    return path


@pytest.fixture(scope='module')
def scored(tmp_path_factory, folders):
    """Options of fid.py: a scripted detector that gives probabilities too, and a reference made with it."""
    folder = tmp_path_factory.mktemp('scripted')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', DeprecationWarning)
        torch.jit.script(Scripted()).save(str(folder / 'tiny.pt'))
    invoke('ref', data=folders[0], dest=folder / 'ref.npz', detector=folder / 'tiny.pt', metrics='fid,pr')
    return dict(detector=folder / 'tiny.pt', ref=folder / 'ref.npz', metrics='fid,is,pr')


def values(path):
    return {line['metric']: line['value'] for line in json_lines(path)}


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_network_scores_as_its_written_images(network, scored, tmp_path):
    """A network scores to the last bit like the images that generate.py writes, on one rank and on two."""
    drawn = ['--seeds=0-40', '--batch=8', '--steps=3', '--class=2']
    assert invoke_script('generate.py', f'--network={network}', f'--outdir={tmp_path / "images"}',
                         *drawn).exit_code == 0
    before = sorted(network.parent.iterdir())
    files = invoke('calc', images=tmp_path / 'images', num=41, batch=8, log=tmp_path / 'files.jsonl', **scored)
    direct = invoke('calc', network=network, seeds='0-40', batch=8, steps=3, log=tmp_path / 'direct.jsonl',
                    **{'class': 2}, **scored)
    assert sorted(network.parent.iterdir()) == before
    assert files.splitlines()[-5:] == direct.splitlines()[-5:]
    torchrun('fid.py', 'calc', f'--network={network}', *drawn, f'--log={tmp_path / "ranks.jsonl"}',
             *(f'--{k}={v}' for k, v in scored.items()))
    expected = values(tmp_path / 'files.jsonl')
    assert list(expected) == ['FD-tiny', 'IS-tiny', 'IS-tiny_std', 'precision-tiny', 'recall-tiny']
    assert values(tmp_path / 'direct.jsonl') == expected == values(tmp_path / 'ranks.jsonl')


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_rounds(network, scored, tmp_path):
    """Each round scores its own range of seeds; the best value of each metric is printed last."""
    common = dict(network=network, steps=2, batch=8, **scored)
    printed = invoke('calc', seeds='5-24', rounds=3, log=tmp_path / 'rounds.jsonl', **common)
    lines = json_lines(tmp_path / 'rounds.jsonl')
    assert [(line['seeds'], line['round']) for line in lines[::5]] == [('5-24', 1), ('25-44', 2), ('45-64', 3)]
    invoke('calc', seeds='25-44', log=tmp_path / 'second.jsonl', **common)
    assert values(tmp_path / 'second.jsonl') == {line['metric']: line['value'] for line in lines[5:10]}
    by_name = {name: [line['value'] for line in lines if line['metric'] == name] for name in ('FD-tiny', 'IS-tiny')}
    assert f'\nFD-tiny: {min(by_name["FD-tiny"]):.8g}\n' in printed
    assert f'\nIS-tiny: {max(by_name["IS-tiny"]):.8g}\n' in printed
    assert printed.count('Round 2 of 3, ') == 5


def test_best_of_rounds():
    rounds = [{'FID': 3., 'IS': 9., 'IS_std': 0.1, 'precision': 0.5, 'recall': 0.6},
              {'FID': 2., 'IS': 8., 'IS_std': 0.2, 'precision': 0.4, 'recall': 0.7}]
    assert metrics.best_scores(['fid', 'is', 'pr'], rounds) == {
        'FID': 2, 'IS': 9, 'IS_std': 0.1, 'precision': 0.5, 'recall': 0.7}


def test_record_beside_the_snapshot(network, folders, reference, tmp_path):
    run_dir = tmp_path / 'run'
    shutil.copytree(network.parent, run_dir)
    invoke('calc', network=run_dir / network.name, seeds='0-9', steps=5, solver='euler', ref=reference)
    line, = json_lines(run_dir / 'metrics.jsonl')
    expected = dict(metric='FD-pixels', detector='pixels', ref=str(reference), num_images=10, seeds='0-9', nfe=5,
                    solver='euler', bnr=0.5, path='constant BNR 0.5', kimg=3.5, system='warm', dataset='colours',
                    network=network.name, sampler=dict(num_steps=5, solver='euler'))
    assert {k: line[k] for k in expected} == expected
    assert len(line['network_sha256']) == len(line['ref_sha256']) == 64 and line['seconds'] > 0 and 'commit' in line
    shutil.copytree(folders[1], tmp_path / 'images')
    invoke('calc', images=tmp_path / 'images', num=50, ref=reference)
    line, = json_lines(tmp_path / 'metrics.jsonl')
    assert line['seeds'] == '0-49' and line['images'] == str(tmp_path / 'images')


def test_scores_are_printed_where_they_cannot_be_recorded(folders, reference, tmp_path):
    shutil.copytree(folders[1], tmp_path / 'images')
    (tmp_path / 'metrics.jsonl').mkdir()
    output = invoke('calc', images=tmp_path / 'images', num=50, ref=reference)
    assert 'FD-pixels: ' in output
    assert 'Warning: the scores were not recorded: could not write ' in output
    assert 'metrics.jsonl: Is a directory; choose another file with --log\n' in output
    fails('calc', 'metrics.jsonl cannot be written', images=tmp_path / 'images', num=50, ref=reference,
          log=tmp_path / 'metrics.jsonl')


def test_scores_that_cannot_be_recorded_where_wished_are_printed(folders, reference, tmp_path, monkeypatch):
    def full(path, record, remedy):
        raise UserError(f'could not write {path}: No space left on device; {remedy}')
    monkeypatch.setattr('training.provenance.append_line', full)
    result = run('calc', images=folders[1], num=50, ref=reference, log=tmp_path / 'a.jsonl')
    refused(result, 'FD-pixels: ', 'a.jsonl: No space left on device; choose another file\n')


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='a device that is full')
@pytest.mark.parametrize('unbuffered', ['', '1'])
def test_scores_that_cannot_be_printed_are_recorded(unbuffered, root, folders, reference, tmp_path):
    """With the output on a full disk: a sentence, no traceback; the same command prints them elsewhere at once."""
    args = ['calc', f'--images={folders[1]}', '--num=50', f'--ref={reference}', '--detector=pixels',
            f'--log={tmp_path / "a.jsonl"}']
    with open('/dev/full', 'w') as full:
        done = subprocess.run([sys.executable, 'fid.py', *args], cwd=root, stdout=full, stderr=subprocess.PIPE,
                              env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONUNBUFFERED': unbuffered}, text=True,
                              timeout=120)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith('Error: could not print the scores: No space left on device; run')
    assert 'Traceback' not in done.stderr and 'Exception' not in done.stderr
    shown = invoke_script('fid.py', *args).output
    score, again = json_lines(tmp_path / 'a.jsonl')
    assert 'Continuing an interrupted run after 50 of 50' in shown and f'FD-pixels: {score["value"]:.8g}\n' in shown
    assert again['value'] == score['value']


# -- interruptions

SLOW = """
import sys, time
sys.path.insert(0, {root!r})
from training import metric_resume
from training.detectors import PixelDetector
metric_resume.SAVE_SECONDS, metric_resume.SAVE_SHARE = 0, 1e9
run = PixelDetector.run
def slow(*args):
    time.sleep(0.05)
    return run(*args)
PixelDetector.run = slow
import fid
fid.main()
"""


@pytest.mark.parametrize('where', ['in a network', 'in a detector'])
def test_ctrl_c_loses_nothing(where, network, reference, tmp_path, monkeypatch):
    """What is scored so far is saved, minutes before that would be due, and a batch that is being scored counts."""
    monkeypatch.setenv('DNNLIB_CACHE_DIR', str(tmp_path))
    options = dict(network=network, seeds='0-9', steps=1, batch=2, ref=reference, log=tmp_path / 'a.jsonl')
    with monkeypatch.context() as patch:
        if where == 'in a network':
            patch.setattr(scoring, 'generate_batch', stop_after(scoring.generate_batch, 2))
        else:
            calls, score = [], PixelDetector.run
            patch.setattr(PixelDetector, 'run', lambda *args: (
                calls.append(1), len(calls) == 2 and signal.raise_signal(signal.SIGINT), score(*args))[-1])
        result = run('calc', **options)
    assert result.exit_code == 130 and 'Aborted' not in result.output
    assert f'Error: interrupted; {fid.KEPT}\n' in result.output and 'the same command continues' in fid.KEPT
    assert 'Continuing an interrupted run after 4 of 10' in invoke('calc', **options)
    monkeypatch.setenv('DNNLIB_CACHE_DIR', str(tmp_path / 'other'))
    assert 'Continuing' not in invoke('calc', **options)
    continued, undisturbed = json_lines(tmp_path / 'a.jsonl')
    assert continued['value'] == undisturbed['value']


def test_ctrl_c_before_the_first_batch_saves_nothing(network, reference, tmp_path, monkeypatch):
    monkeypatch.setenv('DNNLIB_CACHE_DIR', str(tmp_path))
    monkeypatch.setattr(scoring, 'generate_batch', stop_after(scoring.generate_batch, 0))
    assert run('calc', network=network, seeds='0-9', ref=reference).exit_code == 130
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_a_reference_is_made(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(PixelDetector, 'run', stop_after(PixelDetector.run, 0))
    result = run('ref', data=folders[0], dest=tmp_path / 'ref.npz')
    assert result.exit_code == 130 and 'Error: interrupted' in result.output and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('what, ranks', [('images', 1), ('network', 1), ('network', 2)])
def test_a_killed_score_continues(what, ranks, network, folders, reference, tmp_path, monkeypatch):
    """After a kill, the same command continues where it was; its scores are an undisturbed run's to the last bit."""
    (tmp_path / 'slow.py').write_text(SLOW.format(root=str(ROOT)))
    source = [f'--images={folders[1]}', '--num=50'] if what == 'images' else [f'--network={network}', '--seeds=0-49',
                                                                              '--steps=2']
    args = ['calc', *source, f'--ref={reference}', '--detector=pixels', '--metrics=fid,pr', '--batch=2']
    launcher = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}', '--'] if ranks > 1 else []
    command = [sys.executable, *launcher, str(tmp_path / 'slow.py'), *args]
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'DNNLIB_CACHE_DIR': str(tmp_path / 'cache')}
    stored = tmp_path / 'cache' / 'unfinished-scores'

    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(stored.glob('[!.]*.npz'))) < ranks:
        time.sleep(0.01)
    for victim in [*psutil.Process(process.pid).children(recursive=True), process]:
        victim.send_signal(signal.SIGKILL)
    process.wait()
    for leftover in stored.glob('.tmp*'):
        leftover.unlink()
    assert process.returncode == -signal.SIGKILL, 'the run ended before it could be killed'
    assert len(list(stored.glob('*.npz'))) == ranks

    if ranks > 1:
        continued = torchrun('fid.py', *args, f'--log={tmp_path / "a.jsonl"}', ranks=ranks, env=env).stdout
    else:
        monkeypatch.setenv('DNNLIB_CACHE_DIR', env['DNNLIB_CACHE_DIR'])
        continued = invoke_script('fid.py', *args, f'--log={tmp_path / "a.jsonl"}').output
    done = int(re.search(r'Continuing an interrupted run after (\d+) of', continued)[1])
    assert 0 < done < 50 // ranks
    assert not list(stored.iterdir())
    monkeypatch.setenv('DNNLIB_CACHE_DIR', str(tmp_path / 'other'))
    assert 'Continuing' not in invoke_script('fid.py', *args, f'--log={tmp_path / "b.jsonl"}').output
    assert values(tmp_path / 'a.jsonl') == values(tmp_path / 'b.jsonl')


def test_interrupted_rounds_keep_the_finished_ones(network, reference, tmp_path, monkeypatch):
    """After an interruption in round 2, round 1 is not drawn again, and no line is recorded twice."""
    common = dict(network=network, seeds='0-9', steps=1, rounds=2, ref=reference)
    with monkeypatch.context() as patch:
        patch.setattr(scoring, 'generate_batch', stop_after(scoring.generate_batch, 1))
        assert run('calc', log=tmp_path / 'a.jsonl', **common).exit_code == 130
    drawn = []
    with monkeypatch.context() as patch:
        patch.setattr(scoring, 'generate_batch', lambda net, seeds, *args, original=scoring.generate_batch, **kwargs:
                      drawn.append(seeds) or original(net, seeds, *args, **kwargs))
        invoke('calc', log=tmp_path / 'a.jsonl', **common)
    assert drawn == [list(range(10, 20))]
    invoke('calc', log=tmp_path / 'b.jsonl', **common)
    assert [(line['round'], line['value']) for line in json_lines(tmp_path / 'a.jsonl')] == \
        [(line['round'], line['value']) for line in json_lines(tmp_path / 'b.jsonl')]


def test_a_cache_that_cannot_be_written(folders, reference, tmp_path, monkeypatch):
    """A cache folder that cannot be made does not stop the scores."""
    monkeypatch.setattr('training.metric_resume.SAVE_SECONDS', 0)
    (tmp_path / 'cache').write_text('a file where the folder should be')
    monkeypatch.setenv('DNNLIB_CACHE_DIR', str(tmp_path / 'cache'))
    output = invoke('calc', images=folders[1], num=50, ref=reference)
    assert 'FD-pixels' in output and 'Warning: progress cannot be saved' in output


@pytest.mark.skipif(sys.platform != 'linux', reason='names that are no text')
def test_names_that_are_no_utf8(folders, tmp_path, monkeypatch):
    """File names that are not UTF-8, as in old archives, can be scored, trained on, resumed and sampled from."""
    data = tmp_path / os.fsdecode(b'ph\xe9otos')
    shutil.copytree(folders[1], data)
    image = next(data.rglob('*.png'))
    image.rename(image.with_name(os.fsdecode(b'im\xe9.png')))
    reference = tmp_path / 'ref.npz'
    succeed('fid.py', 'ref', f'--data={data}', f'--dest={reference}', '--detector=pixels')
    succeed('fid.py', 'calc', f'--images={data}', '--num=10', f'--ref={reference}', '--detector=pixels')
    for name, options in (('a', []), ('b', [f'--resume={tmp_path / "a"}'])):
        succeed('train.py', *SMALL, f'--data={data}', f'--outdir={tmp_path / name}', '--nosubdir', *options,
                f'--duration={0.000016 if name == "a" else 0.000032}')
    assert len(list((tmp_path / 'b').glob('training-state-*.pt'))) == 1
    (tmp_path / 'a').rename(data / 'run')
    network = next((data / 'run').glob('network-snapshot-*.safetensors'))
    monkeypatch.setenv('PYTHONIOENCODING', 'utf-8:strict')  # as on a terminal
    run_command('generate.py', f'--network={network}', f'--outdir={tmp_path / "out"}', '--seeds=0', '--steps=2')


def stop_after(function, calls):
    """`function`, interrupted once it has been called `calls` times."""
    made = []

    def stopping(*args, **kwargs):
        if len(made) == calls:
            raise KeyboardInterrupt
        made.append(args)
        return function(*args, **kwargs)
    return stopping


def test_what_is_continued_is_the_same_work(folders, tmp_path):
    """Other images under the same names, or another batch size, continue nothing; nor does a damaged file."""
    shutil.copytree(folders[1], tmp_path / 'images')
    first = scoring.ImageFiles(open_images(tmp_path / 'images')).identity()
    assert scoring.ImageFiles(open_images(tmp_path / 'images')).identity() == first
    PIL.Image.new('RGB', (16, 16)).save(tmp_path / 'images' / '000007.png')
    assert scoring.ImageFiles(open_images(tmp_path / 'images')).identity() != first
    assert Unfinished([first, 64]).path != Unfinished([first, 32]).path
    unfinished = Unfinished([first])
    unfinished.path.parent.mkdir(parents=True, exist_ok=True)
    for content in (b'', b'PK\x03\x04 cut off'):
        unfinished.path.write_bytes(content)
        assert unfinished.load() is None
    unfinished.remove()


def test_full_disk_does_not_stop_the_score(folders, reference, monkeypatch):
    def full(file, **arrays):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(np, 'savez', full)
    output = invoke('calc', images=folders[1], num=50, ref=reference)
    assert 'FD-pixels: ' in output and 'Warning: progress cannot be saved, so an interruption would lose it' in output


@pytest.mark.parametrize('total, batch, world', [(50, 8, 3), (5, 64, 4), (64, 64, 1), (100, 1, 7), (129, 64, 2)])
def test_shares_are_whole_batches_in_order(total, batch, world, monkeypatch):
    monkeypatch.setattr(metric_collectors.dist, 'get_world_size', lambda: world)
    shares = metric_collectors.rank_shares(total, batch)
    assert [i for share in shares for i in share] == list(range(total)) and len(shares[0])
    assert all(share.start % batch == 0 for share in shares if share)


def test_exact_sum_does_not_depend_on_grouping():
    terms = torch.randn([60, 4], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    terms = terms * 10. ** torch.arange(60)[:, None].remainder(17) - 3
    sums = []
    for order in (range(60), reversed(range(60))):
        total = metric_collectors.ExactSum()
        for i in order:
            total.add(terms[i])
        again = metric_collectors.ExactSum()
        again.restore(total.state(), 'cpu')
        sums.append(again.over_ranks([range(60)]))
    np.testing.assert_array_equal(sums[0], sums[1])
    assert sums[0][0] == math.fsum(terms[:, 0].tolist())
    assert (terms[:, 0].sum() - terms.flip(0)[:, 0].cumsum(0)[-1]).abs() > 0  # the plain sum does depend on it


# -- bad input

def test_too_few_images(folders, reference):
    fails('calc', 'has 50 images where 50000 are to be scored; make more, or give --num=50', images=folders[1],
          ref=reference)
    fails('calc', 'has no array .features., which kid needs; .* --metrics=fid,kid$', images=folders[1],
          num=50, metrics='kid', ref=edm_like(reference))
    fails('calc', "'kid' needs at least 1000 images in .*ref.npz and there are 60", images=folders[1], num=50,
          metrics='kid', ref=reference)


def edm_like(reference):
    path = reference.parent / 'edm.npz'
    with np.load(reference) as z:
        np.savez(path, mu=z['mu'], sigma=z['sigma'])
    return path


def test_image_that_does_not_decode_is_named(reference, tmp_path):
    write_images(tmp_path, 20)
    (tmp_path / '000011.png').write_bytes((tmp_path / '000011.png').read_bytes()[:60])
    fails('calc', '000011.png', images=tmp_path, ref=reference, num=20)
    fails('ref', '000011.png', data=tmp_path, dest=tmp_path / 'ref.npz')
    assert not (tmp_path / 'ref.npz').exists()


def test_mixed_sizes(reference, tmp_path):
    write_images(tmp_path, 20)
    PIL.Image.new('RGB', (8, 8)).save(tmp_path / '000012.png')
    fails('calc', '000012.png', images=tmp_path, ref=reference, num=20)


def test_names_that_are_no_seeds(tmp_path):
    """Image names with more digits than int() accepts are not taken for seeds."""
    with zipfile.ZipFile(tmp_path / 'set.zip', 'w') as archive:
        for name in ('1', '9' * 5000):
            buffer = io.BytesIO()
            PIL.Image.new('L', (8, 8)).save(buffer, 'PNG')
            archive.writestr(f'{name}.png', buffer.getvalue())
    assert scoring.ImageFiles(open_images(tmp_path / 'set.zip')).record['seeds'] is None


@pytest.mark.parametrize('command, option', [('calc', 'images'), ('calc', 'network'), ('calc', 'ref'), ('calc', 'log'),
                                             ('ref', 'data'), ('ref', 'dest'), ('ref', 'metrics')])
def test_empty_paths(command, option):
    others = {'data': 'x', 'dest': 'y'} if command == 'ref' else {}
    refused(run(command, **{**others, option: ''}), f"'--{option}': it is empty")


def test_options_that_make_no_sense(folders, reference, tmp_path):
    images = dict(images=folders[1], num=50)
    fails('calc', "there is no metric 'fic'", ref=reference, metrics='fid,fic', **images)
    fails('calc', "there is no detector 'pixel'", ref=reference, detector='pixel', **images)
    fails('calc', "'fid' compares with a reference; give --ref", **images)
    fails('calc', "'is' needs class probabilities", metrics='is', **images)
    fails('calc', 'there is no file nowhere.npz', ref='nowhere.npz', **images)
    fails('ref', 'is a folder', data=folders[0], dest=tmp_path)
    with zipfile.ZipFile(tmp_path / 'set.zip', 'w') as archive:
        for i in range(2):
            archive.write(folders[0] / f'{i:06d}.png', f'{i:06d}.png')
    before = (tmp_path / 'set.zip').read_bytes()
    fails('ref', 'set.zip is the data set itself', data=tmp_path / 'set.zip', dest=tmp_path / 'set.zip')
    assert (tmp_path / 'set.zip').read_bytes() == before
    fails('ref', "new/' names no file", data=folders[0], dest=f'{tmp_path}/new/')
    fails('calc', 'new/ cannot be written', ref=reference, log=f'{tmp_path}/new/', **images)
    fails('ref', f'cannot write files in {READ_ONLY}.*choose another folder for e.npz', data=tmp_path,
          dest=f'{READ_ONLY}/e.npz')
    fails('ref', 'no folder or zip', data=tmp_path / 'none', dest=tmp_path / 'x.npz')


NETWORK_ERRORS = {
    'both': (dict(images='x'), 'give either --images=PATH'),
    'number of images': (dict(num=20), '--num goes with --images, not with --network'),
    'too few': (dict(seeds='0-8', metrics='is,fid'), "'is' needs at least 10 images"),
    'one image': (dict(seeds='7'), 'at least 2 images'),
    'a seed twice': (dict(seeds='1,2,3,2'), 'the seed 2 occurs twice'),
    'class': (dict(**{'class': 4}), 'classes 0 to 3'),
    'option of another system': (dict(disc='vp'), '--disc is not an option of the Warm sampler'),
    'missing': (dict(network='nowhere.safetensors'), 'there is no file nowhere.safetensors'),
    'log': (dict(log='/nowhere/x.jsonl'), '/nowhere/x.jsonl cannot be written'),
}


@pytest.mark.parametrize('name', NETWORK_ERRORS)
def test_options_of_networks(name, network, reference, tmp_path):
    options, message = NETWORK_ERRORS[name]
    fails('calc', message, **{'network': network, 'seeds': '0-9', 'ref': reference, **options})


def test_options_of_images(folders, reference):
    images = dict(images=folders[1], num=50, ref=reference)
    for option in ({'seeds': '0-9'}, {'rounds': 3}, {'steps': 3}, {'S_churn': 1}, {'bnr': 0.5}, {'class': 1}):
        fails('calc', f'--{next(iter(option))} goes with --network, not with --images', **images, **option)
    fails('calc', 'give either --images=PATH', ref=reference)


@pytest.fixture
def web_page():
    """Serves an HTML page under any name: web_page(content_type) → address. Closed after the test."""
    servers = []

    def serve(content_type):
        class Page(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.send_header('Content-Type', content_type)
                self.end_headers()
                self.wfile.write(b'<!DOCTYPE html><html><body>Sign in</body></html>')

            def log_message(self, *args):
                pass
        servers.append(http.server.HTTPServer(('127.0.0.1', 0), Page))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f'http://127.0.0.1:{servers[-1].server_port}/cifar10-32x32.npz'
    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize('content_type, message', [
    ('text/html', 'is a web page'), ('application/octet-stream', 'is not an .npz file of statistics')])
def test_reference_address_that_is_a_web_page(folders, tmp_path, monkeypatch, web_page, content_type, message):
    monkeypatch.setenv('DNNLIB_CACHE_DIR', str(tmp_path))
    fails('calc', message, images=folders[1], num=50, ref=web_page(content_type))
    assert not list(tmp_path.rglob('*.npz'))  # nothing bad stays in the cache


def test_reference_address_that_fails(folders, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise requests.ConnectionError()
    monkeypatch.setattr(requests.Session, 'request', refuse)
    monkeypatch.setenv('DNNLIB_CACHE_DIR', str(tmp_path))
    fails('calc', 'could not download https://example.org/cifar10-32x32.npz', images=folders[1], num=50,
          ref='https://example.org/cifar10-32x32.npz')


def test_a_file_that_is_no_detector_is_to_be_deleted_only_in_the_cache(folders, reference, tmp_path, monkeypatch):
    """Reference and detector may be swapped: nobody is told to delete the reference."""
    monkeypatch.setenv('DNNLIB_CACHE_DIR', str(tmp_path / 'cache'))
    (tmp_path / 'cache').mkdir()
    for folder in (tmp_path, tmp_path / 'cache'):
        shutil.copy(reference, folder / 'a.npz')
        with zipfile.ZipFile(folder / 'a.pt', 'w') as z:  # like TorchScript, but damaged
            z.writestr('a/constants.pkl', b'')
            z.writestr('a/code/a.py', b'')
        for name in ('a.npz', 'a.pt'):
            result = run('calc', images=folders[1], num=50, ref=reference, detector=folder / name)
            remedy = 'check that it is the file of a detector, or get it again' if folder == tmp_path else \
                'delete it there, and it is downloaded again'
            refused(result, f'{folder / name}', f'damaged{"; " if name == "a.npz" else " or not for this PyTorch; "}'
                    f'{remedy}\n')


def test_without_inception_other_detectors_are_named(folders, reference, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise requests.ConnectionError()
    monkeypatch.setattr(requests.Session, 'request', refuse)
    monkeypatch.setenv('DNNLIB_CACHE_DIR', str(tmp_path))
    for name in ('inception', 'inception-pth'):
        fails('calc', 'could not download .*, or pixels, with --detector of fid.py', detector=name, images=folders[1],
              num=50, ref=reference)


def test_files_are_missed_before_a_detector_is_fetched(folders, reference, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError('there is no need for a download yet')
    monkeypatch.setattr(requests.Session, 'request', refuse)
    monkeypatch.setenv('DNNLIB_CACHE_DIR', str(tmp_path))
    fails('calc', 'nowhere', detector='inception', images=tmp_path / 'nowhere', num=50, ref=reference)
    fails('calc', '50 images where 51 are to be scored', detector='inception', images=folders[1], num=51, ref=reference)
    fails('calc', 'there is no file nowhere.npz', detector='inception', images=folders[1], num=50, ref='nowhere.npz')
    fails('calc', 'there is no file nowhere.safetensors', detector='inception', network='nowhere.safetensors',
          ref=reference)
    fails('calc', 'there is no file nowhere.npz', network='https://example.org/a.safetensors', ref='nowhere.npz')
    fails('calc', 'give --ref', network='https://example.org/a.safetensors')
    fails('ref', 'nowhere', detector='inception', data=tmp_path / 'nowhere', dest=tmp_path / 'x.npz')


@pytest.mark.parametrize('name, content, allowed', [
    ('x.zip', b'PK\x03\x04', False), ('notes.txt', b'dear diary\n', False), ('new.txt', None, False),
    ('empty.txt', b'', False), ('numbers.txt', b'1\n', False),
    ('scores.txt', b'{"metric": "FID", "value": 2}\n', True), ('new.JSONL', None, True)])
def test_only_json_lines_are_appended_to(folders, reference, tmp_path, name, content, allowed):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    options = dict(images=folders[1], num=50, ref=reference, log=path)
    if allowed:
        invoke('calc', **options)
        assert path.read_bytes().startswith(content or b'') and json_lines(path)[-1]['metric'] == 'FD-pixels'
    else:
        fails('calc', f'{name} is not a file of JSON lines; give a name ending in .jsonl', **options)
        assert (path.read_bytes() if path.exists() else None) == content


def test_images_of_another_size_than_the_references(folders, reference, network, tmp_path):
    """This gives one warning and changes no score; references without sizes, such as EDM's, give none."""
    with np.load(reference) as z:
        assert (z['channels'], z['resolution']) == (3, 16)
    warning = f'Warning: the images have 8x8 pixels with 1 channel(s), those of {reference} 16x16 pixels with 3'
    small = write_images(tmp_path / 'small', 20, size=8, channels=1)
    said = invoke('calc', images=small, num=20, ref=reference)
    assert warning in said and invoke('calc', images=small, num=20, ref=edm_like(reference)) == \
        ''.join(line for line in said.splitlines(keepends=True) if not line.startswith('Warning'))
    drawn = invoke('calc', network=network, seeds='0-4', rounds=2, steps=1, ref=reference)
    assert drawn.count('Warning: the images have 8x8 pixels with 3 channel(s)') == 1
    assert 'Warning' not in invoke('calc', images=folders[1], num=50, ref=reference)


def test_full_disk_leaves_the_old_reference(folders, reference, monkeypatch):
    before = reference.read_bytes()

    def full(file, **arrays):
        file.write(b'half')
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(np, 'savez', full)
    fails('ref', 'could not write .*No space left on device', data=folders[1], dest=reference)
    assert reference.read_bytes() == before


def test_fewer_images_than_a_batch_are_not_padded(monkeypatch):
    """A compiled network would draw, and compile for, a whole batch."""
    sizes = []
    monkeypatch.setattr(scoring, 'generate_batch', lambda *args, size: sizes.append(size) or torch.zeros(3, 1, 8, 8))
    net = types.SimpleNamespace(img_channels=1, img_resolution=8)
    assert len(list(scoring.NetworkImages(net, None, range(3)).batches(range(3), 64))) == 1 and sizes == [3]


def test_a_written_reference_leaves_no_pass_behind(folders, tmp_path, monkeypatch):
    monkeypatch.setenv('DNNLIB_CACHE_DIR', str(tmp_path / 'cache'))
    invoke('ref', data=folders[0], dest=tmp_path / 'ref.npz', metrics='fid,pr')
    assert list((tmp_path / 'cache' / 'unfinished-scores').iterdir()) == []


def test_seconds_of_an_interrupted_pass_count(tmp_path, monkeypatch):
    monkeypatch.setenv('DNNLIB_CACHE_DIR', str(tmp_path))
    first = Unfinished(['x'])
    first.started -= 1000
    first.save(types.SimpleNamespace(state=dict))
    again = Unfinished(['x'])
    assert again.load() == {} and again.seconds() >= 1000


def test_two_images_are_enough_for_a_covariance(folders):
    assert len(open_images(folders[0], 2)) == 2


def test_seeds_of_a_network_are_sorted_as_its_files_would_be():
    net = types.SimpleNamespace(img_channels=1, img_resolution=8)
    assert scoring.NetworkImages(net, None, [3, 1, 2]).seeds == [1, 2, 3]
