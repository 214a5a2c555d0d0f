"""training.state: training states are data, whole or refused."""

import collections
import io
import pickle
import random
import sys
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch

from dnnlib import UserError
from tests import commands
from tests.commands import full_disk
from tests.fuzz.targets import mutate
from training.run_files import parse_kimg
from training.state import STATE_FORMAT, load_state, save_state

STATE = {
    'kimg': 12, 'lr': 1e-3, 'name': 'warm', 'flag': True, 'none': None, 'big': 2 ** 127, 'small': -5,
    'list': [1, [2.5, 'x', []], ()], 'tuple': (1, {'a': torch.zeros(2)}), 0: 'integer key',
    'tensors': {'f32': torch.linspace(0, 1, 7), 'f16': torch.ones(2, 3).half(), 'i64': torch.arange(5),
                'u8': torch.get_rng_state(), 'bool': torch.tensor([True, False]), 'empty': torch.zeros(0, 3),
                'scalar': torch.tensor(3.0), 'bf16': torch.zeros(3, dtype=torch.bfloat16)},
}


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return type(b) is dict and list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


@pytest.fixture(scope='module')
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp('state') / 'training-state-000012.pt'
    save_state(path, STATE)
    return path


def refusal(path):
    sentence = commands.refusal(load_state, path)
    assert str(path) in sentence
    return sentence


def write(path, content):
    torch.save(content, path)
    return path


# -- round trip

def test_round_trip_is_exact(good):
    assert equal(STATE, load_state(good))


def test_the_file_is_within_weights_only(good):
    assert equal(STATE, torch.load(good, weights_only=True)['state'])


def test_state_of_an_optimizer_and_a_network(tmp_path):
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.GroupNorm(1, 2))
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 1, 4, 4)).sum().backward()
    optimizer.step()
    save_state(tmp_path / 'training-state-000000.pt', {'net': net.state_dict(), 'optimizer': optimizer.state_dict()})
    loaded = load_state(tmp_path / 'training-state-000000.pt')
    net.load_state_dict(loaded['net'])
    optimizer.load_state_dict(loaded['optimizer'])
    assert equal(loaded['optimizer'], optimizer.state_dict())


def test_a_view_is_stored_without_the_rest_of_its_storage(tmp_path):
    big = torch.arange(1_000_000.)
    save_state(tmp_path / 's.pt', {'view': big[::1000], 'parameter': torch.nn.Parameter(big[:10])})
    assert (tmp_path / 's.pt').stat().st_size < 20_000
    loaded = load_state(tmp_path / 's.pt')
    assert torch.equal(loaded['view'], big[::1000]) and type(loaded['parameter']) is torch.Tensor


@pytest.mark.parametrize('value', [np.float64(1), np.zeros(2), {1, 2}, b'bytes', object(), print, torch.float32,
                                   torch.Size([1]), 1j, {(1, 2): 3}, 2 ** 5000, torch.zeros(2, 2).to_sparse()])
def test_what_is_not_plain_is_a_mistake_of_the_program(tmp_path, value):
    with pytest.raises(TypeError, match='training state'):
        save_state(tmp_path / 's.pt', {'a': [0, value]})
    assert not list(tmp_path.iterdir())


# -- bad files

def test_missing(tmp_path):
    assert 'no training state' in refusal(tmp_path / 'training-state-000001.pt')
    refusal(tmp_path)


def test_every_truncation_is_refused(good, tmp_path):
    data, path = good.read_bytes(), tmp_path / 's.pt'
    for n in [0, 1, 4, 100, *random.Random(0).sample(range(len(data)), 100), len(data) - 1]:
        path.write_bytes(data[:n])
        refusal(path)


def test_every_flipped_bit_of_a_tensor_is_noticed(tmp_path):
    path = tmp_path / 's.pt'
    save_state(path, {'w': torch.full([1000], 1.5)})
    data = bytearray(path.read_bytes())
    at = data.index(torch.full([1000], 1.5).numpy().tobytes())
    for offset in (0, 1234, 3999):
        data[at + offset] ^= 1
        path.write_bytes(data)
        assert 'checksum' in refusal(path)
        data[at + offset] ^= 1


def test_other_files_are_no_states(tmp_path, good, root):
    path = tmp_path / 's.pt'
    assert 'not a training state' in refusal(write(path, {'weights': torch.zeros(2)}))
    assert 'not a training state' in refusal(write(path, [1, 2]))
    torch.save({'a': torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
    assert 'not a training state' in refusal(path)
    path.write_bytes((root / 'tests/golden/edm-network-snapshot-000123.pkl').read_bytes())
    refusal(path)


def test_a_newer_format_asks_for_an_update(good, tmp_path):
    content = torch.load(good, weights_only=True)
    message = refusal(write(tmp_path / 's.pt', {**content, 'format': STATE_FORMAT + 1}))
    assert 'newer version' in message and 'update' in message
    refusal(write(tmp_path / 's.pt', {**content, 'format': 'x'}))
    refusal(write(tmp_path / 's.pt', {k: v for k, v in content.items() if k != 'state'}))


def test_code_in_a_state_does_not_run(tmp_path, good):
    class Exploit:
        def __reduce__(self):
            return exec, (f'open({str(tmp_path / "ran")!r}, "w")',)
    content = torch.load(good, weights_only=True)
    assert '__builtin__.exec' in refusal(write(tmp_path / 's.pt', {**content, 'state': Exploit()}))
    (tmp_path / 'plain.pt').write_bytes(pickle.dumps(Exploit()))
    refusal(tmp_path / 'plain.pt')
    assert not (tmp_path / 'ran').exists()


class EdmNetwork:
    """What EDM's persistent classes are in a pickle: a call of their own function, which nobody has here."""

    def __reduce__(self):
        return _reconstruct_persistent_obj, (dict(type='class', class_name='EDMPrecond', module_src='raise SystemExit',
                                                  state={'_modules': torch.nn.Linear(2, 2)}),)


def _reconstruct_persistent_obj(meta):
    raise AssertionError('called for real')


def test_a_state_of_edm_says_where_to_go_on_instead(tmp_path, monkeypatch):
    module = type(torch)('torch_utils.persistence')
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj
    monkeypatch.setitem(sys.modules, 'torch_utils.persistence', module)
    monkeypatch.setattr(_reconstruct_persistent_obj, '__module__', 'torch_utils.persistence')
    state = {'net': EdmNetwork(), 'optimizer_state': {'state': {}, 'param_groups': []}}
    message = refusal(write(tmp_path / 'training-state-002500.pt', state))
    assert "EDM's own program" in message and f'--transfer={tmp_path}/network-snapshot-002500.pkl' in message
    assert '--transfer=network-snapshot-KIMG.pkl' in refusal(write(tmp_path / 's.pt', state))


def rebuilt(good, change, compression=zipfile.ZIP_STORED):
    """The archive `good` with its parts {name: bytes} changed."""
    with zipfile.ZipFile(good) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w', compression) as archive:
        for name, data in change(parts):
            archive.writestr(name, data)
    return buffer.getvalue()


def with_pickle(program):
    return lambda parts: [(n, program(d) if n.endswith('data.pkl') else d) for n, d in parts.items()]


def shorter_tensor(parts):
    name = max((n for n in parts if '/data/' in n), key=lambda n: len(parts[n]))
    return [(n, d[:-4] if n == name else d) for n, d in parts.items()]


ARCHIVES = {
    'compressed': (lambda parts: parts.items(), zipfile.ZIP_DEFLATED),
    'twice the same name': (lambda parts: [*parts.items(), next(iter(parts.items()))], zipfile.ZIP_STORED),
    'a tensor shorter than described': (shorter_tensor, zipfile.ZIP_STORED),
    'no description': (lambda parts: [(n, d) for n, d in parts.items() if 'pkl' not in n], zipfile.ZIP_STORED),
    'a tensor missing': (lambda parts: [(n, d) for n, d in parts.items() if not n.endswith('/data/0')],
                         zipfile.ZIP_STORED),
    'deep tuple as key': (with_pickle(lambda d: b'\x80\x02})' + b'\x85' * 900_000 + b'Ns.'), zipfile.ZIP_STORED),
    'deep lists': (with_pickle(lambda d: b'\x80\x02' + b']' * 900_000 + b'a' * 899_999 + b'.'), zipfile.ZIP_STORED),
    'wild sizes': (with_pickle(lambda d: d.replace(b'K\x07', b'K\xff')), zipfile.ZIP_STORED),
    'memo of wild size': (with_pickle(lambda d: b'\x80\x02}r\xff\xff\xff\xff.'), zipfile.ZIP_STORED),
}


@pytest.mark.parametrize('name', ARCHIVES)
@pytest.mark.filterwarnings('ignore:Duplicate name')
def test_archives_that_torch_would_not_have_written(name, good, tmp_path):
    path = tmp_path / 's.pt'
    path.write_bytes(rebuilt(good, lambda parts: parts.items()))
    assert equal(STATE, load_state(path))  # rebuilding alone does no harm
    path.write_bytes(rebuilt(good, *ARCHIVES[name]))
    start = time.process_time()
    refusal(path)
    assert time.process_time() - start < 5


def nested(kind, depth):
    tree = kind([1])
    for _ in range(depth):
        tree = kind([tree, tree])
    return tree


REPEATED = {
    'lists within lists': lambda: nested(list, 45),
    'tuples within tuples': lambda: nested(tuple, 45),
    'a list that holds itself': lambda: (lambda tree: tree.append(tree) or tree)([]),
    'a long list many times': lambda: [[0] * 1000] * 100_000,
    'a long text many times': lambda: ['x' * 100_000] * 100_000,
    'a long key many times': lambda: [{'x' * 100_000: 1}] * 100_000,
    'a tensor many times': lambda: [torch.zeros(100_000)] * 50_000,
}


@pytest.mark.parametrize('name', REPEATED)
def test_content_that_only_sharing_keeps_small(name, good, tmp_path):
    content = {**torch.load(good, weights_only=True), 'state': {'a': REPEATED[name]()}}
    path = write(tmp_path / 's.pt', content)
    start = time.process_time()
    assert 'repeats' in refusal(path)
    assert time.process_time() - start < 5


def test_a_tensor_in_two_places_is_no_repetition(tmp_path):
    w = torch.randn(10_000)
    save_state(tmp_path / 's.pt', {'net': w, 'ema': w})
    assert torch.equal(load_state(tmp_path / 's.pt')['ema'], w)


def test_mutations_load_or_are_refused(good, tmp_path):
    data, path, rng = good.read_bytes(), tmp_path / 's.pt', random.Random(1)
    with zipfile.ZipFile(good) as archive:
        program = archive.read(next(n for n in archive.namelist() if n.endswith('data.pkl')))
    outcomes = collections.Counter()
    start = time.monotonic()
    for i in range(400):
        if i % 2:  # to get behind the checksum, change the description and make the archive anew
            path.write_bytes(rebuilt(good, with_pickle(lambda _: mutate(program, rng))))
        else:
            path.write_bytes(mutate(data, rng))
        one = time.process_time()
        try:
            load_state(path)
            outcomes['loaded'] += 1
        except UserError:
            outcomes['refused'] += 1
        assert time.process_time() - one < 5
        if time.monotonic() - start > 60:
            break
    assert outcomes['loaded'] > 5 and outcomes['refused'] > 5


# -- writing

def test_a_state_is_not_packed_in_memory_first(tmp_path):
    tracemalloc.start()
    try:
        save_state(tmp_path / 'training-state-000001.pt', {'w': torch.zeros(1_000_000)})
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize('length, free', [(100_000, 8192), (10, 512)])  # written at once, and from the file's buffer
def test_a_full_disk_leaves_the_former_state(length, free, good, tmp_path):
    path = tmp_path / 'training-state-000001.pt'
    path.write_bytes(good.read_bytes())
    with full_disk(free), pytest.raises(UserError, match='could not write.*large'):
        save_state(path, {'w': torch.zeros(length)})
    assert path.read_bytes() == good.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


# -- names

@pytest.mark.parametrize('name, kimg', [('training-state-000012.pt', 12), ('network-snapshot-200000.pkl', 200_000),
                                        ('network-snapshot-1234567.safetensors', 1_234_567)])
def test_parse_kimg(name, kimg, tmp_path):
    assert parse_kimg(name) == parse_kimg(tmp_path / name) == kimg


@pytest.mark.parametrize('name', ['edm-cifar10.pkl', 'training-state-12.pt', 'training-state-000012.pkl',
                                  'network-snapshot-000012.pt', '', 'training-state-000012.pt.bak'])
def test_parse_kimg_refuses_other_names(name):
    with pytest.raises(UserError):
        parse_kimg(name)
