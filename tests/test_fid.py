"""The fid.py command: real runs with the pixel detector, and what it says about bad input."""

import http.server
import os
import re
import subprocess
import sys
import threading

import click.testing
import numpy as np
import PIL.Image
import pytest
import requests
import torch

import fid
from training.metric_images import image_batches, open_images


def write_images(folder, n, seed=0, size=16, channels=3):
    """n random smooth PNGs; the seed shifts their colours."""
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
    """click's result of fid.py in this process."""
    args = [f'--{k}={v}' for k, v in {**options, 'detector': detector}.items()]
    return click.testing.CliRunner().invoke(fid.main, [command, *args])


def invoke(command, **options):
    result = run(command, **options)
    assert result.exit_code == 0, result.output
    return result.output


def fails(command, message, **options):
    """The command ends with exit code 1 and one sentence, without a traceback."""
    result = run(command, **options)
    errors = [line for line in result.output.splitlines() if line.startswith('Error: ')]
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), (result.output, result.exception)
    assert len(errors) == 1 and re.search(message, errors[0]), result.output


def pixel_statistics(folder, n):
    """(mu, sigma) by NumPy alone."""
    x = np.stack([np.asarray(PIL.Image.open(folder / f'{i:06d}.png')) for i in range(n)]) / 127.5 - 1
    x = x.reshape(n, 8, 2, 8, 2, 3).mean(axis=(2, 4)).transpose(0, 3, 1, 2).reshape(n, -1)
    return x.mean(axis=0), np.cov(x.T)


def launch(root, *args, ranks=None):
    """fid.py as a user starts it."""
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    torchrun = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}', '--'] if ranks else []
    done = subprocess.run([sys.executable, *torchrun, 'fid.py', *args], cwd=root, env=env, capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return dict(line.split(': ') for line in done.stdout.splitlines() if re.fullmatch(r'\S+: \S+', line))


def test_two_commands_give_the_plain_number(root, folders, tmp_path):
    """As EDM's users know it; two ranks change nothing."""
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


# ---- Bad input.

def test_too_few_images(folders, reference):
    fails('calc', 'has 50 images where 50000 are to be scored; make more, or give --num=50', images=folders[1],
          ref=reference)
    fails('calc', 'has no array .features., which kid,pr need', images=folders[1], num=50, metrics='kid',
          ref=edm_like(reference))
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


def test_options_that_make_no_sense(folders, reference, tmp_path):
    images = dict(images=folders[1], num=50)
    fails('calc', "there is no metric 'fic'", ref=reference, metrics='fid,fic', **images)
    fails('calc', "there is no detector 'pixel'", ref=reference, detector='pixel', **images)
    fails('calc', "'fid' compares with a reference; give --ref", **images)
    fails('calc', "'is' needs class probabilities", metrics='is', **images)
    fails('calc', 'there is no file nowhere.npz', ref='nowhere.npz', **images)
    fails('ref', 'is a folder', data=folders[0], dest=tmp_path)
    fails('ref', 'no folder or zip', data=tmp_path / 'none', dest=tmp_path / 'x.npz')


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


def test_full_disk_leaves_the_old_reference(folders, reference, monkeypatch):
    before = reference.read_bytes()

    def full(file, **arrays):
        file.write(b'half')
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(np, 'savez', full)
    fails('ref', 'could not write .*No space left on device', data=folders[1], dest=reference)
    assert reference.read_bytes() == before
