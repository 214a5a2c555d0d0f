"""Damage files in many ways and read them: nothing but a UserError may come of it.

    python -m tests.fuzz.fuzz --cases 10000

Each case is one damaged file, decided by its number. A case fails if anything but a result or a UserError comes of it,
if it takes 5 seconds of the processor or the process grows beyond 1 GiB, or if code runs that is no module of Python's.
A crash or a case without end is noticed from outside. The test suite runs a few hundred (tests/test_untrusted.py).
"""

import collections
import io
import json
import os
import pathlib
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile

import click
import numpy as np
import PIL.Image
import torch

from dnnlib import UserError
from training import image_codec, metrics
from training.dataset import EMBEDDED, ImageFolderDataset
from training.detectors import PixelDetector
from training.snapshot import HEADER_KEY, build_network, read_snapshot, save_snapshot
from training.state import load_state, save_state
from warm.systems import SYSTEMS

ROOT = pathlib.Path(__file__).resolve().parents[2]
MAX_SEC, MAX_BYTES = 5, 1 << 30
STALL_SEC = 120  # without a finished case, on whatever busy machine
EDM_PICKLE = ROOT / 'tests' / 'golden' / 'edm-network-snapshot-000123.pkl'
SMALL = dict(img_resolution=8, img_channels=1, model_type='SongUNet', model_channels=8, channel_mult=[1], num_blocks=1,
             attn_resolutions=[], label_dim=2)


# ---- Damage.

NUMBERS = [b'\xff' * 8, bytes(8), b'\xff\xff\xff\x7f', b'\0\0\0\x80', (2 ** 40).to_bytes(8, 'little'),
           (10 ** 9).to_bytes(4, 'big'), (10 ** 9).to_bytes(4, 'little')]
WORDS = [b'[' * 100_000, b'{"a":' * 50_000, b'9' * 5000, b'1e999', b'-1', b'NaN', b'null', b'"', b'[]', b'{}', b'true',
         b'../../../etc/passwd', b'\\u0000', b'99999999999']


def mutate(data, rng):
    """A damaged copy of `data`: bits, bytes, pieces and numbers changed, lost or repeated."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 8])):
        at, n = rng.randrange(len(data) + 1), rng.choice([1, 4, 16, 200])
        kind = rng.randrange(8)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at:at + 4] = rng.randbytes(4)
        elif kind == 2:
            del data[at:at + rng.randint(1, n)]
        elif kind == 3:
            data[at:at] = data[at:at + rng.randint(1, n)]
        elif kind == 4:
            number = rng.choice(NUMBERS)
            data[at:at + len(number)] = number
        elif kind == 5:
            data[at:at] = rng.choice(WORDS)
        elif kind == 6:
            digits = [i for i in range(at, min(at + 400, len(data))) if 48 <= data[i] < 58]
            if digits:
                data[rng.choice(digits)] = rng.randrange(48, 58)
        else:
            del data[at:]
    return bytes(data)


def rebuilt_zip(data, change):
    """A zip with its first part that change(name, content) changes, stored again with right checksums."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, 'w') as new:
        for info in old.infolist():
            new.writestr(info.filename, change(info.filename, old.read(info)), info.compress_type)
    return out.getvalue()


# ---- What is damaged, and how it is read.

class Snapshot:
    """The project's snapshots; one in two without a checksum, to get behind it."""

    def __init__(self, folder):
        path = folder / 'network-snapshot-000001.safetensors'
        save_snapshot(path, SYSTEMS['edm'].network_class(**SMALL), 'edm', kimg=1)
        self.whole = path.read_bytes()
        n = int.from_bytes(self.whole[:8], 'little')
        header = json.loads(self.whole[8:8 + n])
        header['__metadata__'][HEADER_KEY] = json.dumps(
            {k: v for k, v in json.loads(header['__metadata__'][HEADER_KEY]).items() if k != 'checksum'})
        text = json.dumps(header).encode()
        self.unchecked = text, self.whole[8 + n:]
        self.path = path

    def damage(self, rng):
        if rng.random() < 0.3:
            return mutate(self.whole, rng)
        text, tensors = self.unchecked
        text = mutate(text, rng)
        return len(text).to_bytes(8, 'little') + text + tensors

    def read(self, data):
        self.path.write_bytes(data)
        build_network(read_snapshot(self.path), SYSTEMS)


class EdmPickle:
    """EDM's own snapshots."""

    def __init__(self, folder):
        self.whole, self.path = EDM_PICKLE.read_bytes(), folder / 'network-snapshot-000123.pkl'

    def damage(self, rng):
        return mutate(self.whole, rng)

    def read(self, data):
        self.path.write_bytes(data)
        build_network(read_snapshot(self.path), SYSTEMS)


class State:
    """Training states; one in two with the archive around the damaged part made anew."""

    def __init__(self, folder):
        net = torch.nn.Linear(3, 2)
        optimizer = torch.optim.Adam(net.parameters())
        self.path = folder / 'training-state-000001.pt'
        save_state(self.path, {'net': net.state_dict(), 'optimizer': optimizer.state_dict(), 'a': [1, 'x', (None, 2.5)]})
        self.whole = self.path.read_bytes()

    def damage(self, rng):
        if rng.random() < 0.4:
            return mutate(self.whole, rng)
        return rebuilt_zip(self.whole, lambda name, data: mutate(data, rng) if name.endswith('data.pkl') else data)

    def read(self, data):
        self.path.write_bytes(data)
        load_state(self.path)


class Labels:
    """dataset.json in a folder."""

    def __init__(self, folder):
        self.folder = folder / 'labelled'
        self.folder.mkdir()
        for name in ('a.png', 'b.png'):
            PIL.Image.new('L', (4, 4)).save(self.folder / name)
        self.whole = b'{"labels": [["a.png", 1], ["b.png", 0]], "more": {"x": [1.5, "\\u00e9", null]}}'

    def damage(self, rng):
        return mutate(self.whole, rng)

    def read(self, data):
        (self.folder / 'dataset.json').write_bytes(data)
        ImageFolderDataset(self.folder, use_labels=True)[0]


class Png:
    """Image files, as training and as dataset_tool.py read them."""

    def __init__(self, folder):
        self.whole = []
        for mode, options in (('L', {}), ('RGB', {}), ('P', {}), ('I;16', {}), ('RGBA', {'compress_level': 9})):
            out = io.BytesIO()
            PIL.Image.new(mode, (9, 7)).save(out, 'PNG', **options)
            self.whole.append(out.getvalue())

    def damage(self, rng):
        return mutate(rng.choice(self.whole), rng)

    def read(self, data):
        for reader in (image_codec.decode, image_codec.open_image):
            try:
                reader(data, 'x.png')
            except UserError as e:
                error = e
            else:
                error = None
        if error is not None:
            raise error


class Zip:
    """Zipped data sets."""

    def __init__(self, folder):
        whole = io.BytesIO()
        with zipfile.ZipFile(EMBEDDED) as old, zipfile.ZipFile(whole, 'w', zipfile.ZIP_DEFLATED) as new:
            names = [n for n in old.namelist() if n.endswith('.png')][:3]
            for name in names:
                new.writestr(name, old.read(name))
            new.writestr('dataset.json', json.dumps({'labels': [[name, 0] for name in names]}))
        self.whole, self.path = whole.getvalue(), folder / 'set.zip'

    def damage(self, rng):
        return mutate(self.whole, rng)

    def read(self, data):
        self.path.write_bytes(data)
        dataset = ImageFolderDataset(self.path, use_labels=True)
        [dataset[i] for i in range(len(dataset))]


class Npz:
    """Statistics; one in two with the archive around the damaged array made anew."""

    def __init__(self, folder):
        self.detector, self.path, whole = PixelDetector('cpu'), folder / 'ref.npz', io.BytesIO()
        np.savez(whole, mu=np.zeros(192), sigma=np.eye(192), num=np.int64(100), detector=np.array('pixels'),
                 detector_hash=np.array(self.detector.digest))
        self.whole = whole.getvalue()

    def damage(self, rng):
        if rng.random() < 0.4:
            return mutate(self.whole, rng)
        wanted = rng.choice(['mu', 'sigma', 'num', 'detector'])
        return rebuilt_zip(self.whole, lambda name, data: mutate(data[:200], rng) + data[200:] if name == wanted + '.npy'
                           else data)

    def read(self, data):
        self.path.write_bytes(data)
        metrics.load_reference(self.path, ['fid'], self.detector)


TARGETS = {'snapshot': Snapshot, 'state': State, 'edm': EdmPickle, 'labels': Labels, 'png': Png, 'zip': Zip, 'npz': Npz}


# ---- The process in which files are read.

FORBIDDEN = {'os.system', 'os.exec', 'os.posix_spawn', 'os.spawn', 'os.fork', 'os.forkpty', 'pty.spawn', 'socket.connect',
             'subprocess.Popen', 'ctypes.dlopen', 'shutil.rmtree', 'pickle.find_class'}


class Tripwire:
    """Notes every event of Python's that only code in a file could have caused. Once armed it stays."""

    def __init__(self):
        self.armed, self.events = False, []
        sys.addaudithook(self.hook)

    def hook(self, event, args):
        if not self.armed:
            return
        if event == 'exec' and not os.path.exists(getattr(args[0], 'co_filename', '')):  # a module of Python's is fine
            self.events.append(f'exec of {args[0]}')
        elif event in FORBIDDEN and not str(args[:1]).startswith("('torch"):
            self.events.append(f'{event}{args}')


def peak_memory():
    """Most memory that this program has taken, in bytes. (getrusage would also count its parent's before the exec.)"""
    status = pathlib.Path('/proc/self/status')
    if status.is_file():
        return int(re.search(r'VmHWM:\s+(\d+) kB', status.read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_cases(name, first, count, tripwire, tell=lambda i: None):
    """Run the cases of a target; returns ({outcome: number}, sentences about what failed)."""
    outcomes, failures = collections.Counter(), []
    with tempfile.TemporaryDirectory() as tmp:
        target = TARGETS[name](pathlib.Path(tmp))
        warnings.simplefilter('ignore')
        tripwire.armed = False
        for i in [*range(-20, 0), *range(first, first + count)]:  # the first only load what is loaded when first used
            data = target.damage(random.Random(f'{name} {i}'))
            tripwire.armed = i >= 0
            started = time.process_time()
            try:
                target.read(data)
                outcomes['read'] += 1
            except UserError as e:
                outcomes['refused'] += 1
                if len(str(e)) > 2000 or '\n' in str(e):
                    failures.append(f'{name} {i}: not one sentence: {str(e)[:300]!r}')
            except Exception as e:
                failures.append(f'{name} {i}: {type(e).__name__}: {str(e)[:300]}')
            seconds = time.process_time() - started
            tripwire.armed = False
            if seconds > MAX_SEC:
                failures.append(f'{name} {i}: {seconds:.1f} s')
            if peak_memory() > MAX_BYTES:
                failures.append(f'{name} {i}: the process has grown beyond 1 GiB')
                break
            tell(i)
        failures += [f'{name}: {event}' for event in tripwire.events]
        tripwire.events.clear()
    return dict(outcomes), failures


def watched(name, first, count):
    """`run_cases` in a process of its own, so that a crash or a hang is noticed; the same result."""
    with tempfile.NamedTemporaryFile('r') as progress:
        command = [sys.executable, '-m', 'tests.fuzz.fuzz', '--child', progress.name, '--target', name, '--first', str(first),
                   '--cases', str(count)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                   env={**os.environ, 'OMP_NUM_THREADS': '1'})
        while process.poll() is None:
            try:
                process.wait(1)
            except subprocess.TimeoutExpired:
                if time.time() - os.stat(progress.name).st_mtime > STALL_SEC:
                    process.kill()
        said = process.stdout.read()
        if process.returncode:
            last = progress.read().split()[-1:]
            return {}, [f'{name}: ended with code {process.returncode} after case {last}: {said[-1000:]}']
        return json.loads(said.splitlines()[-1])


@click.command()
@click.option('--cases', default=10_000, help='Files to read per target')
@click.option('--first', default=0, help='Number of the first')
@click.option('--target', 'names', type=click.Choice(list(TARGETS)), multiple=True, help='[default: all]')
@click.option('--child', metavar='FILE', hidden=True)
def main(cases, first, names, child):
    """Damage files in many ways and read them."""
    if child:
        with open(child, 'w') as f:
            print(json.dumps(run_cases(names[0], first, cases, Tripwire(), lambda i: print(i, file=f, flush=True))))
        return
    failed = False
    for name in names or TARGETS:
        started = time.monotonic()
        outcomes, failures = watched(name, first, cases)
        print(f'{name:10} {outcomes}, {len(failures)} failures, {time.monotonic() - started:.0f} s', flush=True)
        print(''.join(f'  {failure}\n' for failure in failures[:20]), end='', flush=True)
        failed |= bool(failures)
    sys.exit(int(failed))


if __name__ == '__main__':
    main()
