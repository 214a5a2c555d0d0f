"""What is damaged, how, and how it is read: one class for each kind of file.

Each has `damage(rng)`, which gives the bytes of a damaged file, and `read(data)`, which reads it as the project does.
"""

import contextlib
import gzip
import io
import json
import pathlib
import pickle
import struct
import tarfile
import zipfile

import numpy as np
import PIL.Image
import torch

from dnnlib import UserError
from torch_utils import training_stats
from training import image_codec, metrics
from training.compact import compact
from training.dataset import EMBEDDED, ImageFolderDataset
from training.dataset_sources import CIFAR10_BATCHES, read_cifar10, read_mnist
from training.detectors import PixelDetector
from training.progress import Progress, restore, resume_from, run_state, seed_rank
from training.saving import host_copy
from training.snapshot import HEADER_KEY, build_network, read_snapshot, save_snapshot
from training.state import load_state, save_state
from warm.systems import SYSTEMS

EDM_PICKLE = pathlib.Path(__file__).resolve().parents[1] / 'golden' / 'edm-network-snapshot-000123.pkl'
SMALL = dict(img_resolution=8, img_channels=1, model_type='SongUNet', model_channels=8, channel_mult=[1], num_blocks=1,
             attn_resolutions=[], label_dim=2)


# -- damage

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
    """The zip `data` with each member's content as change(name, content) gives it, and right checksums."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, 'w') as new:
        for info in old.infolist():
            new.writestr(info.filename, change(info.filename, old.read(info)), info.compress_type)
    return out.getvalue()


# -- what is damaged, and how it is read

class Snapshot:
    """The project's snapshots; seven in ten without a checksum, to get behind it."""

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
    """Training states; six in ten with the archive around the damaged part made anew."""

    def __init__(self, folder):
        net = torch.nn.Linear(3, 2)
        optimizer = torch.optim.Adam(net.parameters())
        self.path = folder / 'training-state-000001.pt'
        save_state(self.path, dict(net=net.state_dict(), optimizer=optimizer.state_dict(), a=[1, 'x', (None, 2.5)]))
        self.whole = self.path.read_bytes()

    def damage(self, rng):
        if rng.random() < 0.4:
            return mutate(self.whole, rng)
        return rebuilt_zip(self.whole, lambda name, data: mutate(data, rng) if name.endswith('data.pkl') else data)

    def read(self, data):
        self.path.write_bytes(data)
        load_state(self.path)


WILD = [None, True, -1, 2 ** 62, 2 ** 127, 1e308, float('nan'), '', 'x' * 1000, '[' * 1000, [], {}, (), [None],
        {'x': 1}, torch.zeros(0), torch.zeros(()), torch.full([3], float('inf')), torch.arange(5),
        torch.zeros(2, 3, 4).bool()]


def damaged_tree(tree, rng):
    """A copy of a tree of dicts and lists with a few of its parts lost, repeated elsewhere or replaced."""
    def copy(value):
        if isinstance(value, dict):
            return {key: copy(item) for key, item in value.items()}
        return [copy(item) for item in value] if isinstance(value, list) else value

    tree = copy(tree)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        branch, depth = tree, rng.randrange(5)
        while True:
            key = rng.choice(list(branch) if isinstance(branch, dict) else range(len(branch)))
            if depth == 0 or not isinstance(branch[key], (dict, list)) or not branch[key]:
                break
            branch, depth = branch[key], depth - 1
        kind = rng.randrange(4)
        if kind == 0 and len(branch) > 1:
            del branch[key]
        elif kind == 1:
            branch[key] = copy(rng.choice(list(branch.values()) if isinstance(branch, dict) else branch))
        else:
            branch[key] = copy(rng.choice(WILD))
    return tree


class Resume:
    """Training states with a right checksum and wrong content, exact and compact, up to where training starts."""

    def __init__(self, folder):
        self.path = folder / 'training-state-000001.pt'
        self.net, self.ema = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
        self.net.init_kwargs = dict(img_resolution=8, channel_mult=[1, 2])
        self.optimizer = torch.optim.Adam(self.net.parameters())
        for param in self.net.parameters():
            param.grad = torch.ones_like(param)
        self.optimizer.step()
        training_stats.report('Loss/loss', 1.5)
        state = run_state(self.net, self.ema.state_dict(), self.optimizer, Progress(nimg=64, tick=1),
                          dict(seed=0, ema_rampup_ratio=0.05), {'Progress/tick': {'num': 1, 'mean': 0, 'std': 0}})
        self.states = [host_copy(state), compact(state)]

    def damage(self, rng):
        save_state(self.path, damaged_tree(rng.choice(self.states), rng))
        return self.path.read_bytes()

    def read(self, data):
        self.path.write_bytes(data)
        with contextlib.redirect_stdout(None):
            state = resume_from(self.path)
        restore(state, self.path, self.net, self.ema, self.optimizer)
        seed_rank(0, state, self.path)


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
    """Statistics; six in ten with the archive around the damaged array made anew."""

    def __init__(self, folder):
        self.detector, self.path, whole = PixelDetector('cpu'), folder / 'ref.npz', io.BytesIO()
        np.savez(whole, mu=np.zeros(192), sigma=np.eye(192), num=np.int64(100), detector=np.array('pixels'),
                 detector_hash=np.array(self.detector.digest))
        self.whole = whole.getvalue()

    def damage(self, rng):
        if rng.random() < 0.4:
            return mutate(self.whole, rng)
        wanted = rng.choice(['mu.npy', 'sigma.npy', 'num.npy', 'detector.npy'])
        return rebuilt_zip(self.whole, lambda name, data: mutate(data[:200], rng) + data[200:] if name == wanted
                           else data)

    def read(self, data):
        self.path.write_bytes(data)
        metrics.load_reference(self.path, ['fid'], self.detector)


class CifarBatch:
    """The pickle of a CIFAR-10 batch, in the archive that is downloaded."""

    def __init__(self, folder):
        self.path = folder / 'cifar-10-python.tar.gz'
        batch = {b'data': np.zeros([2, 3072], np.uint8), b'labels': [3, 7]}
        self.whole = [pickle.dumps(batch, protocol=p) for p in (2, 4, 5)]

    def damage(self, rng):
        return mutate(rng.choice(self.whole), rng)

    def read(self, data):
        with tarfile.open(self.path, 'w:gz', compresslevel=1) as tar:
            for name in CIFAR10_BATCHES:
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        read_cifar10(self.path)


class Mnist:
    """MNIST's file of images; one in two damaged before it was packed."""

    def __init__(self, folder):
        self.path = folder / 'train-images-idx3-ubyte.gz'
        self.whole = struct.pack('>4I', 0x803, 2, 28, 28) + bytes(2 * 28 * 28)
        labels = folder / 'train-labels-idx1-ubyte.gz'
        labels.write_bytes(gzip.compress(struct.pack('>2I', 0x801, 2) + bytes([3, 7])))

    def damage(self, rng):
        if rng.random() < 0.5:
            return gzip.compress(mutate(self.whole, rng), 1)
        return mutate(gzip.compress(self.whole, 1), rng)

    def read(self, data):
        self.path.write_bytes(data)
        read_mnist(self.path)


TARGETS = {'snapshot': Snapshot, 'state': State, 'resume': Resume, 'edm': EdmPickle, 'labels': Labels, 'png': Png,
           'zip': Zip, 'npz': Npz, 'cifar': CifarBatch, 'mnist': Mnist}
