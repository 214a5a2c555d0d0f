"""Files from anywhere are data: hostile and damaged ones are refused soon, in little memory, and run nothing."""

import gzip
import io
import json
import math
import os
import string
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib

import hypothesis
import numpy as np
import PIL.Image
import pytest
from hypothesis import strategies as st

from dnnlib import UserError
from dnnlib.json_files import json_line, read_object
from tests.commands import ROOT, invoke, refusal
from tests.fuzz.fuzz import peak_memory
from training import dataset_sources, metrics
from training.dataset import ImageFolderDataset
from training.detectors import PixelDetector
from training.npz import read_npz

HYPOTHESIS = hypothesis.settings(deadline=None, max_examples=40, derandomize=True, database=None,
                                 suppress_health_check=list(hypothesis.HealthCheck))


@pytest.fixture(autouse=True)
def bounded():
    """No test of this file may take more than 10 s of processor time or 500 MiB more memory than before."""
    before, start = peak_memory(), time.process_time()
    yield
    assert time.process_time() - start < 10
    assert peak_memory() - before < 500 << 20


# -- the fuzzer

def test_damaged_files_of_every_kind():
    """They are refused or read. A sample, in one process; `python -m tests.fuzz.fuzz` reads 10,000 of each kind."""
    done = subprocess.run([sys.executable, '-c', '''
import json
from tests.fuzz.fuzz import *
tripwire = Tripwire()
print(json.dumps({name: run_cases(name, 0, 60, tripwire) for name in TARGETS}))'''], cwd=ROOT, capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for name, (outcomes, failures) in json.loads(done.stdout).items():
        assert not failures, failures
        assert outcomes['refused'] > 5, name  # the damage is real


def test_the_fuzzer_notices_what_it_looks_for():
    program = ('''
import json
from tests.fuzz import fuzz
class Bad:
    def __init__(self, folder):
        pass
    def damage(self, rng):
        return b''
    def read(self, data):
        exec(compile('1', '<data>', 'exec'))
        open('/dev/full', 'w')
        raise KeyError('oops')
fuzz.TARGETS['bad'] = Bad
print(json.dumps(fuzz.run_cases('bad', 0, 2, fuzz.Tripwire())))''')
    done = subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True)
    _, failures = json.loads(done.stdout)
    for expected in ('KeyError', 'exec of', 'writing /dev/full'):
        assert any(expected in failure for failure in failures), (expected, done.stderr)


# -- bombs

def png(width, height, data=b''):
    def chunk(kind, content):
        return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))
    return (b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 0, 0, 0, 0))
            + chunk(b'IDAT', zlib.compress(data)) + chunk(b'IEND', b''))


def data_set(path, files):
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as z:
        for name, content in files.items():
            z.writestr(name, content)
    return path


@pytest.mark.parametrize('size', [(10 ** 5, 10 ** 4), (2 ** 31 - 1, 1)])
def test_an_image_of_a_thousand_million_pixels(size, tmp_path):
    message = refusal(ImageFolderDataset, data_set(tmp_path / 'set.zip', {'a.png': png(*size)}))
    assert 'a.png' in message and 'remove it' in message


def test_a_zip_bomb(tmp_path):
    path = data_set(tmp_path / 'set.zip', {'a.png': bytes(300 << 20)})
    assert path.stat().st_size < 1 << 20
    assert 'larger than' in refusal(ImageFolderDataset, path)


def test_a_zip_that_lies_about_the_size_of_a_file(tmp_path):
    """Its entry says 100 bytes, and 200 MiB come out of it."""
    path = data_set(tmp_path / 'set.zip', {'a.png': bytes(200 << 20)})
    data = path.read_bytes()
    path.write_bytes(data.replace(struct.pack('<I', 200 << 20), struct.pack('<I', 100)))
    refusal(ImageFolderDataset, path)


def test_labels_that_unpack_to_far_more_than_the_images_need(tmp_path):
    path = data_set(tmp_path / 'set.zip', {'a.png': png(4, 4, bytes(20)), 'dataset.json': b'[' + b'[],' * (20 << 20)})
    assert 'dataset.json' in refusal(ImageFolderDataset, path, use_labels=True)


@pytest.mark.parametrize('text', ['[' * 10 ** 6, '{"labels":' * 10 ** 5,
                                  '{"labels": ' + '[' * 10 ** 5 + ']' * 10 ** 5 + '}', '{"labels": [["a.png", 1e999]]}',
                                  '{"labels": [["a.png", 99999999999]]}',
                                  '{"labels": [["a.png", ' + '9' * 5000 + ']]}', '{"labels": [["a.png", NaN]]}'])
def test_wild_json(text, tmp_path):
    path = data_set(tmp_path / 'set.zip', {'a.png': png(4, 4, bytes(20)), 'dataset.json': text})
    assert 'dataset.json' in refusal(ImageFolderDataset, path, use_labels=True)


def test_wild_json_beside_images(tmp_path):
    (tmp_path / 'generation.json').write_text('[' * 10 ** 6)
    assert read_object(tmp_path / 'generation.json') is None


@pytest.mark.parametrize('name', ['../../evil.png', '/evil.png', 'C:\\evil.png', 'a/../../evil.png', '\\evil.png',
                                  'a\\..\\evil.png', '..'])
def test_names_outside_a_zip_are_refused(name, tmp_path):
    (tmp_path / 'in').mkdir()
    path = data_set(tmp_path / 'in' / 'set.zip', {'good.png': png(4, 4, bytes(20)), name: png(4, 4, bytes(20))})
    assert 'a place outside of it' in refusal(ImageFolderDataset, path)
    assert sorted(p.name for p in tmp_path.rglob('*')) == ['in', 'set.zip']


def test_dots_in_names_are_no_places(tmp_path):
    names = ['a..b.png', 'c../d.png', 'e/f...png', 'g/h..i/j.png', 'j:k.png']
    assert len(ImageFolderDataset(data_set(tmp_path / 'set.zip', {name: png(4, 4, bytes(20)) for name in names}))) == 5


def npy(shape, dtype='<f8', data=b''):
    header = repr({'descr': dtype, 'fortran_order': False, 'shape': shape}).encode()
    header += b' ' * (-(len(header) + 11) % 64) + b'\n'
    return b'\x93NUMPY\x01\x00' + struct.pack('<H', len(header)) + header + data


@pytest.mark.parametrize('files', [
    {'mu.npy': npy((10 ** 12,))}, {'mu.npy': npy((10 ** 30,))}, {'mu.npy': npy((), '|S2000000000')},
    {'mu.npy': npy((3,), '|O', b'c' * 100)}, {'mu.npy': npy((40 << 20,), data=bytes(320 << 20))}, {'mu.npy': b'x'},
    {'mu.npy': npy('(' * 3000)}, {'mu.npy': b'\x93NUMPY\x01\x00\xff\xff' + b'[' * 65535}, {'mu.npy': npy((-5,))}])
def test_statistics_that_lie(files, tmp_path):
    path = data_set(tmp_path / 'ref.npz', files)
    with pytest.raises(ValueError):
        read_npz(path, ['mu'])
    assert 'ref.npz' in refusal(metrics.load_reference, path, ['fid'], PixelDetector('cpu'))


def tar_gz(path, member, size):
    """A tarball with one member of `size` zeros, a megabyte of them written at a time."""
    with gzip.open(path, 'wb', compresslevel=1) as f:
        info = tarfile.TarInfo(member)
        info.size = size
        f.write(info.tobuf())
        for _ in range(size >> 20):
            f.write(bytes(1 << 20))
    return path


def test_a_tarball_that_unpacks_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_sources, 'MAX_TAR_BYTES', 50 << 20)
    path = tar_gz(tmp_path / 'cifar-10-python.tar.gz', 'other', 200 << 20)
    assert 'unpacks to more' in refusal(dataset_sources.read_cifar10, path)


@pytest.mark.parametrize('program', [
    b'\x80\x02}q\x00r\xff\xff\xff\x7f.', b'\x80\x02})' + b'\x85' * 900_000 + b'Ns.',
    b'\x80\x02' + b']' * 900_000 + b'.', b'\x80\x04cos\nsystem\n\x8c\x04true\x85R.'])
def test_a_pickle_made_to_crash(program, tmp_path):
    path = tmp_path / 'cifar-10-python.tar.gz'
    with tarfile.open(path, 'w:gz') as tar:
        info = tarfile.TarInfo(dataset_sources.CIFAR10_BATCHES[0])
        info.size = len(program)
        tar.addfile(info, io.BytesIO(program))
    assert 'data_batch_1' in refusal(dataset_sources.read_cifar10, path)


def test_an_idx_file_that_asks_for_all_memory(tmp_path):
    for kind, shape in (('images-idx3', (300_000, 1024, 1024)), ('labels-idx1', (5,))):
        path = tmp_path / f'train-{kind}-ubyte.gz'
        path.write_bytes(gzip.compress(struct.pack(f'>{1 + len(shape)}I', 0x800 + len(shape), *shape)))
    assert 'header' in refusal(dataset_sources.read_mnist, str(tmp_path / 'train-images-idx3-ubyte.gz'))


def test_lines_are_json_whatever_the_numbers():
    assert json_line({'a': [math.nan, (math.inf, 1.0)]}) == '{"a": [null, [null, 1.0]]}\n'


# -- whatever a user may type or have

WORD = st.one_of(st.integers(-5, 600).map(str), st.floats().map(str),
                 st.text(string.printable.replace('\x00', ''), max_size=8),
                 st.sampled_from(['1,2', 'latest', '0.1-2', 'warm']))
FLAGS = st.sampled_from(['--batch', '--batch-gpu', '--cbase', '--cres', '--lr', '--ema', '--dropout', '--augment',
                         '--xflip', '--fp16', '--ls', '--cond', '--arch', '--precond', '--bnr', '--duration', '--tick',
                         '--snap', '--dump', '--grid', '--seed', '--keep', '--max-nonfinite', '--timeout', '--workers',
                         '--desc', '--data', '--transfer', '--resume', '--preset', '--eval', '--eval-metrics',
                         '--lr-rampup'])


@HYPOTHESIS
@hypothesis.given(st.lists(st.tuples(FLAGS, WORD), max_size=4))
def test_any_options_of_train(options):
    """A dry run shows the options or says in a sentence what is wrong with them; it leaves nothing behind."""
    out = invoke('train.py', '-n', '--outdir=/nonexistent/runs', '--cbase=8', '--cres=1',
                 *(f'{flag}={value}' for flag, value in options))
    assert out.exit_code in (0, 1, 2) and isinstance(out.exception, (SystemExit, type(None))), (options, out.exception)
    assert 'Dry run' in out.output if out.exit_code == 0 else 'Error' in out.output, (options, out.output)
    assert not os.path.exists('/nonexistent/runs')


NAMES = st.text(string.ascii_letters + './\\é ', min_size=1, max_size=6).filter(lambda n: not n.endswith('/'))
LABELS = st.one_of(st.none(), st.integers(-2, 200), st.lists(st.floats(), max_size=3), st.text(max_size=3),
                   st.booleans())


@HYPOTHESIS
@hypothesis.given(images=st.dictionaries(NAMES, st.tuples(st.sampled_from(['L', 'RGB', 'RGBA', 'P', '1']),
                                                          st.integers(1, 4), st.integers(1, 4)), max_size=4),
                  labels=st.one_of(st.none(), st.lists(LABELS, max_size=5)), use_labels=st.booleans())
def test_any_data_set(images, labels, use_labels, tmp_path_factory):
    """It can be read from end to end, or a sentence says what is wrong with it."""
    path = tmp_path_factory.mktemp('any') / 'set.zip'
    with zipfile.ZipFile(path, 'w') as z:
        for name, (mode, width, height) in images.items():
            out = io.BytesIO()
            PIL.Image.new(mode, (width, height)).save(out, 'PNG')
            z.writestr(name + '.png', out.getvalue())
        if labels is not None:
            named = [[f'{name}.png', label] for name, label in zip(images, labels)]
            z.writestr('dataset.json', json.dumps({'labels': named}))
    try:
        dataset = ImageFolderDataset(path, use_labels=use_labels)
        items = [dataset[i] for i in range(len(dataset))]
    except UserError as e:
        assert '\n' not in str(e)
    else:
        assert len(items) == len(images) and all(i.shape == tuple(dataset.image_shape) for i, _ in items)
        assert all(np.isfinite(label).all() and label.shape == (dataset.label_dim,) for _, label in items)
