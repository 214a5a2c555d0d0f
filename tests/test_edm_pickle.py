"""training.edm_pickle: EDM's files become plain data, and nothing in them runs."""

import collections
import io
import pickle
import pickletools
import random
import struct
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch

from dnnlib import UserError
from tests import commands
from tests.fuzz.targets import mutate
from training.edm_pickle import load_edm_pickle
from training.pickle_machine import MAX_STEPS, Refused
from training.pickled_tensors import Storage, rebuild_tensor

P = b'\x80\x04'


@pytest.fixture(scope='module')
def path(root):
    return root / 'tests' / 'golden' / 'edm-network-snapshot-000123.pkl'


@pytest.fixture(scope='module')
def good(path):
    return path.read_bytes()


def text(s):
    return b'X' + struct.pack('<I', len(s)) + s.encode()


def call(module, name, args=b')'):
    """The opcodes for module.name(*args)."""
    return text(module) + text(name) + b'\x93' + args + b'R'


def refusal(data):
    return commands.refusal(load_edm_pickle, data)


# -- reading

def test_reads_the_recorded_file(path, golden):
    content = load_edm_pickle(path)
    assert content['class_name'] == 'EDMPrecond'
    assert content['kwargs'] == golden('edm-snapshot-io').meta['kwargs']
    assert content['dataset_kwargs']['path'] == 'datasets/cifar10-32x32.zip'
    assert content['loss_class'] == 'EDMLoss'
    assert content['augment_kwargs']['xflip'] == 1e8
    assert content['state_dict']['model.enc.16x16_conv.weight'].shape == (8, 3, 3, 3)
    assert all(t.isfinite().all() for t in content['state_dict'].values())


def test_embedded_source_is_a_tripwire_that_does_not_fire(good):
    assert b'raise RuntimeError' in good
    load_edm_pickle(good)


def storages(data):
    """The byte strings in a pickle that are storages."""
    return [arg for op, arg, _ in pickletools.genops(data) if op.name.endswith('BINBYTES') and len(arg) > 100]


def weights_only(raw):
    """A float32 storage as PyTorch reads it."""
    return torch.tensor([]).set_(torch.load(io.BytesIO(raw), weights_only=True).untyped())


@pytest.mark.filterwarnings('ignore:TypedStorage')
def test_storages_equal_what_weights_only_loading_makes_of_them(good):
    expected = [weights_only(raw) for raw in storages(good)]
    found = [t.flatten() for t in load_edm_pickle(good)['state_dict'].values()]
    assert len(found) == len(expected) > 100
    for t in found:
        assert any(torch.equal(t, e) for e in expected)


def fake_edm_pickle(state, module_src='raise SystemExit', **others):
    """A pickle such as EDM writes, made with Python's own pickler."""
    fake = type(sys)('torch_utils.persistence')
    fake._reconstruct_persistent_obj = _reconstruct_persistent_obj
    meta = dict(type='class', version=6, module_src=module_src, class_name='EDMPrecond', state=state)
    before = sys.modules.get('torch_utils.persistence')
    sys.modules['torch_utils.persistence'] = fake
    try:
        return pickle.dumps({'ema': _Persistent(meta), 'loss_fn': None, **others}, protocol=4)
    finally:
        sys.modules.pop('torch_utils.persistence')
        if before is not None:
            sys.modules['torch_utils.persistence'] = before


def _reconstruct_persistent_obj(meta):
    raise AssertionError('called for real')


_reconstruct_persistent_obj.__module__ = 'torch_utils.persistence'


class _Persistent:
    def __init__(self, meta):
        self.meta = meta

    def __reduce__(self):
        return _reconstruct_persistent_obj, (self.meta,)


def module_state(parameters=None, buffers=None, **others):
    return {'_parameters': parameters or {}, '_buffers': buffers or {}, '_modules': {}, '_init_kwargs': {}, **others}


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64,
                                   torch.uint8, torch.bool])
def test_tensors_of_every_kind_keep_their_values(dtype):
    base = (torch.arange(24).reshape(2, 3, 4) % 2).to(dtype)
    state = module_state({'w': torch.nn.Parameter(base, requires_grad=False), 'none': None},
                         {'view': base[:, 1:, ::2], 'flipped': base.transpose(0, 2), 'empty': base[:0],
                          'scalar': base[0, 0, 1], 'hidden': base}, _non_persistent_buffers_set={'hidden'})
    found = load_edm_pickle(fake_edm_pickle(state, big=torch.zeros(100)))['state_dict']
    assert list(found) == ['w', 'view', 'flipped', 'empty', 'scalar']
    for name in found:
        expected = base if name == 'w' else state['_buffers'][name]
        assert found[name].dtype == dtype and torch.equal(found[name], expected)


def test_numpy_numbers_become_python_numbers_under_both_names_of_their_module():
    kwargs = {'a': np.float64(0.5), 'b': np.int32(-7), 'c': np.bool_(True), 'd': np.dtype('>f4').type(2)}
    data = fake_edm_pickle(module_state(_init_kwargs=kwargs))
    new, old = b'\x8c\x16numpy._core.multiarray', b'\x8c\x15numpy.core.multiarray'
    assert (new in data) != (old in data)
    for version in (data.replace(new, old), data.replace(old, new)):  # frame lengths, now off, are only hints
        found = load_edm_pickle(version)['kwargs']
        assert found == {'a': 0.5, 'b': -7, 'c': True, 'd': 2.0}
        assert all(type(v) in (int, float, bool) for v in found.values())


def test_positional_arguments_get_their_names():
    """A script may make EDMPrecond(32, 3, 10): the first four arguments are the same in all of EDM's networks."""
    data = fake_edm_pickle(module_state(_init_args=(32, 3, 10), _init_kwargs={'model_type': 'SongUNet'}))
    assert load_edm_pickle(data)['kwargs'] == dict(img_resolution=32, img_channels=3, label_dim=10,
                                                   model_type='SongUNet')
    for args, words in (((32, 3, 10, False, 0.5), 'more positional arguments than img_resolution'),
                        (7, 'malformed'), ((32, 3), 'given twice')):
        data = fake_edm_pickle(module_state(_init_args=args, _init_kwargs={'img_channels': 3}))
        assert words in refusal(data)


def test_keys_follow_the_nesting_of_modules(good):
    """The names that layouts and networks use: containers add a level, None entries nothing."""
    names = list(load_edm_pickle(good)['state_dict'])
    assert 'model.enc.16x16_block0.norm0.weight' in names and len(names) == len(set(names))


# -- refusing

@pytest.mark.parametrize('module, name', [('os', 'system'), ('builtins', 'eval'), ('builtins', 'getattr'),
                                          ('torch', 'load'), ('torch_utils.persistence', 'persistent_class'),
                                          ('numpy', 'load'), ('training.pickle_machine', 'Machine')])
def test_unknown_globals_are_refused_by_name(module, name):
    assert f'{module}.{name}' in refusal(P + call(module, name) + b'.')
    assert f'{module}.{name}' in refusal(P + b'c' + f'{module}\n{name}\n'.encode() + b')R.')


def test_names_are_shown_without_control_characters():
    assert 'a\\x1b[31m\\nb.' in refusal(P + call('a\x1b[31m\nb', 'c' * 10_000) + b'.')


def test_an_ordinary_exploit_does_not_run(tmp_path):
    class Exploit:
        def __reduce__(self):
            return exec, (f'open({str(tmp_path / "ran")!r}, "w")',)
    for protocol in range(6):
        refusal(pickle.dumps({'ema': Exploit()}, protocol=protocol))
    assert not (tmp_path / 'ran').exists()


def test_only_stand_ins_can_be_called():
    refusal(P + text('torch') + text('FloatStorage') + b'\x93' + b')R.')
    refusal(P + text('x') + b')R.')
    refusal(P + b'})\x81.')


HOSTILE = {
    'nothing': b'',
    'no stop': P,
    'stack underflow': P + b'R.',
    'mark underflow': P + b't.',
    'not a dict': P + b'].',
    'no ema': P + b'}.',
    'protocol 0': b'(dp0\n.',
    'ema is text': P + b'}' + text('ema') + text('x') + b's.',
    'bytes of wild length': P + b'\x8e' + b'\xff' * 8 + b'.',
    'text of wild length': P + b'\x8d' + struct.pack('<Q', 1 << 40) + b'x.',
    'memo index of wild size': P + b'}r\xff\xff\xff\xff.',
    'memo miss': P + b'j\xff\xff\xff\xff.',
    'deep lists': P + b']' * 900_000 + b'.',
    'deep tuple as key': P + b'}' + b')' + b'\x85' * 900_000 + b'Ns.',
    'deep tuple in set': P + b'\x8f()' + b'\x85' * 900_000 + b'\x90.',
    'doubling tuple': P + b')' + b'q\x00h\x00h\x00\x86' * 60 + b'Ns.',
    'too many steps': P + b'N' * (MAX_STEPS + 1) + b'.',
    'set filled again and again': P + b'](' + b''.join(b'J' + struct.pack('<i', i) for i in range(50_000)) + b'eq\x00'
                                  + (text('builtins') + text('set') + b'\x93h\x00\x85R') * 20_000 + b'.',
    'extension': P + b'\x82\x01.',
    'persistent id': P + text('x') + b'Q.',
    'build on a dict': P + b'}}b.',
    'invalid text': P + b'\x8c\x02\xff\xff.',
    'a key that cannot be': P + b'}]Ns.',
    'dtype of wild length': P + call('numpy', 'dtype', text('V99999999999') + b'\x85') + b'.',
    'storage that is none': P + call('torch.storage', '_load_from_bytes', b'C\x03abc\x85') + b'.',
    'empty storage': P + call('torch.storage', '_load_from_bytes', b'C\x00\x85') + b'.',
}


@pytest.mark.parametrize('name', HOSTILE)
def test_hostile_programs_are_refused_soon(name):
    start = time.process_time()
    refusal(HOSTILE[name])
    assert time.process_time() - start < 5


def test_endless_nesting_of_values_and_modules_is_refused():
    nested, shared, cyclic = [], [], [1]
    for _ in range(100):
        nested = [nested]
    for _ in range(40):
        shared = [shared, shared]
    cyclic.append(cyclic)
    for value in (nested, shared, cyclic):
        refusal(fake_edm_pickle(module_state(_init_kwargs={'x': value})))
    refusal(fake_edm_pickle(module_state({'x' * 10_000: torch.zeros(1)})))
    refusal(fake_edm_pickle(module_state(_modules={'a': 'not a module'})))


def test_a_tensor_given_many_names_is_refused():
    """One storage under many names would make a small file ask for a lot of memory when it is copied."""
    weight = torch.zeros(1000)
    refusal(fake_edm_pickle(module_state({f'w{i}': weight for i in range(1000)})))


@pytest.mark.parametrize('offset, size, stride', [
    (0, (11,), (1,)), (1, (10,), (1,)), (10, (1,), (1,)), (-1, (2,), (1,)), (0, (2,), (-1,)), (0, (10 ** 12,), (0,)),
    (0, (2, 2), (1, 9)), (0, (2,), (10 ** 18,)), (0, (2 ** 40, 2 ** 40), (0, 0)), (0, (1,) * 20, (1,) * 20),
    (0, (True,), (1,)), (0, (2.0,), (1,)), (0, (2,), (1, 1)), (0, [2], [1]), ('0', (2,), (1,)), (2 ** 70, (1,), (1,))])
def test_tensors_cannot_leave_their_storage(offset, size, stride):
    with pytest.raises(Refused):
        rebuild_tensor(Storage(torch.zeros(10)), offset, size, stride)


def test_tensors_within_their_storage_are_views_of_it():
    flat = torch.arange(10.)
    for offset, size, stride in [(0, (10,), (1,)), (9, (1,), (1,)), (1, (3, 3), (3, 1)), (0, (3, 2), (1, 5)),
                                 (3, (), ())]:
        assert torch.equal(rebuild_tensor(Storage(flat), offset, size, stride), flat.as_strided(size, stride, offset))


@pytest.mark.filterwarnings('ignore:TypedStorage')
def test_a_storage_that_lies_about_its_length_is_refused(good):
    raw = storages(good)[0]
    numel = len(weights_only(raw))
    at = len(raw) - 4 * numel - 8
    assert raw[at:at + 8] == struct.pack('<q', numel)
    for lie in (numel + 1, numel - 1, 2 ** 61, -1):
        bad = raw[:at] + struct.pack('<q', lie) + raw[at + 8:]
        assert 'length' in refusal(good.replace(raw, bad))


def test_every_truncation_is_refused(good):
    for n in [0, 1, 2, 10, 100, *random.Random(0).sample(range(len(good)), 60), len(good) - 1]:
        refusal(good[:n])


def test_mutations_load_or_are_refused(good):
    rng = random.Random(1)
    outcomes = collections.Counter()
    start = time.monotonic()
    for _ in range(300):
        one = time.process_time()
        data = mutate(good, rng)
        try:
            load_edm_pickle(data)
            outcomes['loaded'] += 1
        except UserError:
            outcomes['refused'] += 1
        assert time.process_time() - one < 5
        if time.monotonic() - start > 60:
            break
    assert outcomes['loaded'] > 5 and outcomes['refused'] > 5


def test_hostile_programs_need_little_memory(root, tmp_path):
    """All of them, in one process, take less than 1 GiB beyond what importing PyTorch takes."""
    (tmp_path / 'programs').write_bytes(pickle.dumps(HOSTILE))
    code = f'''
        import pickle, torch
        from dnnlib import UserError
        from tests.fuzz.fuzz import peak_memory
        from training.edm_pickle import load_edm_pickle
        torch.frombuffer(bytearray(8), dtype=torch.float32)
        before = peak_memory()
        for data in pickle.load(open({str(tmp_path / 'programs')!r}, 'rb')).values():
            try:
                load_edm_pickle(data)
            except UserError:
                pass
        print((peak_memory() - before) >> 20)
    '''
    done = subprocess.run([sys.executable, '-c', textwrap.dedent(code)], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1024


def test_files_that_cannot_be_read(tmp_path):
    assert 'there.pkl' in refusal(tmp_path / 'there.pkl')
    (tmp_path / 'empty.pkl').write_bytes(b'')
    assert 'empty' in refusal(tmp_path / 'empty.pkl')
    assert 'read' in refusal(tmp_path)
