"""training.snapshot: snapshots give back the network bit for bit, run nothing, and say what is wrong with them."""

import collections
import json
import pickle
import random
import struct
import time
import types

import pytest
import safetensors.torch
import torch

from dnnlib import UserError
from tests.commands import full_disk, refusal
from tests.fuzz.fuzz import peak_memory
from tests.fuzz.targets import mutate
from training import networks, snapshot
from training.snapshot import (SYSTEM_OF_EDM_CLASS, HEADER_KEY, SNAPSHOT_FORMAT, Snapshot, build_network,
                               read_snapshot, save_snapshot)

SYSTEMS = {name: types.SimpleNamespace(network_class=getattr(networks, cls))
           for cls, name in SYSTEM_OF_EDM_CLASS.items()}
SMALL = dict(img_resolution=8, img_channels=1, model_type='SongUNet', model_channels=8, channel_mult=[1],
             num_blocks=1, attn_resolutions=[])


class Tiny(torch.nn.Module):
    """A stand-in network: small enough to fuzz, with all that is awkward to store."""

    def __init__(self, width=4, **unused):
        super().__init__()
        self.init_kwargs = dict(width=width, **unused)
        self.weight = torch.nn.Parameter(torch.randn(width, width, 2, 2).to(memory_format=torch.channels_last))
        self.tied = self.weight
        self.register_buffer('steps', torch.arange(width))
        self.register_buffer('view', self.steps[1:])
        self.register_buffer('empty', torch.zeros(0, width))
        self.low = torch.nn.Parameter(torch.randn(width).half())


TINY = {'tiny': types.SimpleNamespace(network_class=Tiny)}


@pytest.fixture(scope='module')
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp('snapshot') / 'network-snapshot-000007.safetensors'
    save_snapshot(path, Tiny(), 'tiny', dataset={'name': 'digits', 'labels': None}, kimg=7, extra={'seed': 1})
    return path


@pytest.fixture
def edm_path(root):
    return root / 'tests' / 'golden' / 'edm-network-snapshot-000123.pkl'


# -- round trip

def test_round_trip_is_exact(good):
    torch.manual_seed(0)
    net = Tiny(width=5)
    save_snapshot(good.parent / 'other.safetensors', net, 'tiny')
    snapshot = read_snapshot(good.parent / 'other.safetensors')
    assert (snapshot.dataset, snapshot.kimg, snapshot.extra) == ({}, None, {})
    again = build_network(snapshot, TINY)
    assert list(again.state_dict()) == list(net.state_dict())
    for name, tensor in net.state_dict().items():
        found = again.state_dict()[name]
        assert found.dtype == tensor.dtype and torch.equal(found, tensor)


def test_only_what_must_be_copied_is_copied():
    """A run saves a copy of its weights already, so a second would take memory for nothing."""
    plain, turned = torch.zeros(3, 4), torch.zeros(4, 3).T
    given = {'plain': plain, 'tied': plain, 'turned': turned, 'part': torch.zeros(9)[2:]}
    separate = snapshot._separate(given)
    assert all(torch.equal(tensor, given[name]) for name, tensor in separate.items()) and list(separate) == list(given)
    assert separate['plain'].data_ptr() == plain.data_ptr()
    assert len({tensor.data_ptr() for tensor in separate.values()}) == 4
    assert separate['turned'].is_contiguous() and separate['part'].untyped_storage().nbytes() == 28


def test_the_header_comes_back(good):
    snapshot = read_snapshot(good)
    assert (snapshot.system, snapshot.network_kwargs, snapshot.kimg) == ('tiny', {'width': 4}, 7)
    assert snapshot.dataset == {'name': 'digits', 'labels': None} and snapshot.extra == {'seed': 1}
    assert snapshot.path == good


@pytest.mark.parametrize('name', SYSTEMS)
def test_networks_of_every_system_round_trip(name, tmp_path):
    net = SYSTEMS[name].network_class(**SMALL).eval()
    save_snapshot(tmp_path / 'net.safetensors', net, name)
    state = torch.get_rng_state()
    again = build_network(read_snapshot(tmp_path / 'net.safetensors'), SYSTEMS)
    assert torch.equal(torch.get_rng_state(), state)  # building draws nothing from the caller's generator
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    assert (again.sigma_min, again.sigma_max) == (net.sigma_min, net.sigma_max)
    x, sigma = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 2.0])
    with torch.no_grad():
        assert torch.equal(again(x, sigma), net(x, sigma))


def test_the_built_network_does_not_depend_on_the_file(good, tmp_path):
    path = tmp_path / 'copy.safetensors'
    path.write_bytes(good.read_bytes())
    net = build_network(read_snapshot(path), TINY)
    before = net.weight.clone()
    with open(path, 'r+b') as f:
        f.write(bytes(path.stat().st_size))
    assert torch.equal(net.weight, before)


def test_a_snapshot_of_edm_gives_its_recorded_output(edm_path, golden):
    snapshot = read_snapshot(edm_path)
    assert (snapshot.system, snapshot.kimg) == ('edm', 123)
    assert snapshot.dataset['path'] == 'datasets/cifar10-32x32.zip'
    io = golden('edm-snapshot-io')
    net = build_network(snapshot, SYSTEMS)
    with torch.no_grad():
        out = net(*(torch.from_numpy(io.arrays[name]) for name in ('x', 'sigma', 'labels')))
    torch.testing.assert_close(out, torch.from_numpy(io.arrays['out']), rtol=1e-5, atol=1e-6)


def test_a_snapshot_of_edm_converts_without_loss(edm_path, tmp_path):
    net = build_network(read_snapshot(edm_path), SYSTEMS)
    save_snapshot(tmp_path / 'x.safetensors', net, 'edm')
    again = build_network(read_snapshot(tmp_path / 'x.safetensors'), SYSTEMS)
    for name, tensor in read_snapshot(edm_path).state_dict.items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_content_decides_not_the_ending(good, edm_path, tmp_path):
    (tmp_path / 'a.pkl').write_bytes(good.read_bytes())
    (tmp_path / 'b.safetensors').write_bytes(edm_path.read_bytes())
    assert read_snapshot(tmp_path / 'a.pkl').system == 'tiny'
    assert read_snapshot(tmp_path / 'b.safetensors').system == 'edm'


def test_loading_runs_no_code(good, edm_path, monkeypatch):
    """Reading either kind of file uses neither Python's unpickler nor exec or eval."""
    def forbidden(*args, **kwargs):
        raise AssertionError('code was about to run')
    for module, name in ((pickle, 'Unpickler'), (pickle, 'load'), (pickle, 'loads'), (torch, 'load')):
        monkeypatch.setattr(module, name, forbidden)
    monkeypatch.setattr('builtins.exec', forbidden)
    monkeypatch.setattr('builtins.eval', forbidden)
    read_snapshot(good)
    read_snapshot(edm_path)


# -- bad files

def test_missing(tmp_path):
    assert 'x.safetensors' in refusal(read_snapshot, tmp_path / 'x.safetensors')
    assert 'is a folder; give a file' in refusal(read_snapshot, tmp_path)
    for kimg in ('000200', '1000000', '000003'):
        (tmp_path / f'network-snapshot-{kimg}.safetensors').touch()
    assert refusal(read_snapshot, tmp_path).endswith('network-snapshot-1000000.safetensors is the newest')


@pytest.mark.parametrize('content', [b'', b'x', b'<html></html>', b'PK\x03\x04' + bytes(100), bytes(1000)])
def test_not_a_snapshot(content, tmp_path):
    (tmp_path / 'x').write_bytes(content)
    assert 'not a network snapshot' in refusal(read_snapshot, tmp_path / 'x')


def test_every_truncation_is_refused(good, tmp_path):
    data, path = good.read_bytes(), tmp_path / 'x.safetensors'
    for n in range(len(data)):
        path.write_bytes(data[:n])
        assert str(path) in refusal(read_snapshot, path)


def safetensors_file(path, header, data=b''):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack('<Q', len(header)) + header + data)
    return path


def meta(**changes):
    header = {'format': SNAPSHOT_FORMAT, 'system': 'tiny', 'network_kwargs': {}, 'dataset': {}, 'kimg': 1, 'extra': {}}
    return json.dumps({k: v for k, v in {**header, **changes}.items() if v != 'absent'})


@pytest.mark.parametrize('text', [
    '', '{', 'null', '[]', '3', '"x"', '{}', '[' * 100_000 + ']' * 100_000, '{"a":' * 100_000, '9' * 10_000,
    meta(format='absent'), meta(format='1'), meta(format=1.0), meta(format=True), meta(format=0), meta(format=-1),
    meta(system='absent'), meta(system=3), meta(network_kwargs='absent'), meta(network_kwargs=[1]),
    meta(dataset='absent'), meta(dataset='x'), meta(kimg='absent'), meta(kimg='x'), meta(extra=[])])
def test_bad_headers(text, tmp_path):
    path = safetensors_file(tmp_path / 'x.safetensors', {'__metadata__': {HEADER_KEY: text}})
    assert f'header of {path}' in refusal(read_snapshot, path)


def test_unknown_entries_and_a_missing_extra_are_fine(tmp_path):
    text = meta(extra='absent', sha256='later')
    path = safetensors_file(tmp_path / 'x.safetensors', {'__metadata__': {HEADER_KEY: text}})
    assert read_snapshot(path).extra == {}


def test_a_newer_format_asks_for_an_update(tmp_path):
    text = meta(format=SNAPSHOT_FORMAT + 1, system={'not': 'yet known'})
    path = safetensors_file(tmp_path / 'x.safetensors', {'__metadata__': {HEADER_KEY: text}})
    message = refusal(read_snapshot, path)
    assert 'newer version' in message and 'update' in message


def tensor(**changes):
    return {'w': {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 8], **changes}}


@pytest.mark.parametrize('header, data', [
    (tensor(), bytes(4)), (tensor(), bytes(12)), (tensor(shape=[3]), bytes(8)), (tensor(shape=[2 ** 62, 4]), bytes(8)),
    (tensor(data_offsets=[0, 2 ** 63]), bytes(8)), (tensor(data_offsets=[8, 0]), bytes(8)),
    (tensor(dtype='X9'), bytes(8)), (tensor(data_offsets=[4, 12]), bytes(12)), (tensor(shape='x'), bytes(8)),
    (b'{' * 100_000, b''), (b'{"w":', b''),
    ({**tensor(), 'v': tensor()['w']}, bytes(8))])
def test_headers_that_lie_about_tensors(header, data, tmp_path):
    if isinstance(header, dict):
        header = {**header, '__metadata__': {HEADER_KEY: meta()}}
    path = safetensors_file(tmp_path / 'x.safetensors', header, data)
    assert 'damaged' in refusal(read_snapshot, path)


@pytest.mark.parametrize('length', [2 ** 64 - 1, 2 ** 40, 10 ** 8, 9, 1])
def test_headers_that_lie_about_their_length(length, tmp_path):
    (tmp_path / 'x').write_bytes(struct.pack('<Q', length) + b'{' + bytes(100))
    assert 'damaged' in refusal(read_snapshot, tmp_path / 'x')


def test_a_huge_header_is_refused(tmp_path):
    safetensors_file(tmp_path / 'x', b'{' + b' ' * (20 << 20) + b'}')
    assert 'damaged' in refusal(read_snapshot, tmp_path / 'x')


def test_tensors_alone_are_no_snapshot(tmp_path):
    safetensors.torch.save_file({'w': torch.zeros(2)}, tmp_path / 'x.safetensors')
    assert 'not a network snapshot' in refusal(read_snapshot, tmp_path / 'x.safetensors')


def test_a_network_of_an_unknown_class_is_named(edm_path, tmp_path):
    data = edm_path.read_bytes().replace(b'\x8c\x0aEDMPrecond', b'\x8c\x0aXYZPrecond', 1)
    (tmp_path / 'x.pkl').write_bytes(data)
    message = refusal(read_snapshot, tmp_path / 'x.pkl')
    assert 'XYZPrecond' in message and 'EDMPrecond' in message


def test_a_damaged_edm_pickle_is_named(edm_path, tmp_path):
    (tmp_path / 'x.pkl').write_bytes(edm_path.read_bytes()[:-100])
    assert str(tmp_path / 'x.pkl') in refusal(read_snapshot, tmp_path / 'x.pkl')


# -- bad networks

def snapshot_of(state_dict, system='tiny', **network_kwargs):
    return Snapshot(system, network_kwargs, state_dict, {}, None, {}, 'x.safetensors')


def test_an_unknown_system_is_named_with_the_known_ones():
    message = refusal(build_network, snapshot_of({}, 'later'), SYSTEMS)
    assert "'later'" in message and 'vp, ve, iddpm, edm' in message


def test_arguments_that_the_network_does_not_accept():
    net = networks.EDMPrecond(**SMALL)
    for change in ({'wings': 2}, {'model_channels': 'many'}, {'model_type': 'NoUNet'}, {'img_resolution': None},
                   {'channel_mult': 3}, {'model_channels': -8}, {'model_channels': 0}, {'num_blocks': 1e9}):
        snapshot = snapshot_of(net.state_dict(), 'edm', **{**SMALL, **change})
        assert 'x.safetensors' in refusal(build_network, snapshot, SYSTEMS)


def test_tensors_that_do_not_match():
    state = Tiny().state_dict()
    assert 'lacks the tensor tied' in refusal(
        build_network, snapshot_of({k: v for k, v in state.items() if k != 'tied'}), TINY)
    assert 'unexpected tensor surplus' in refusal(
        build_network, snapshot_of({**state, 'surplus': torch.zeros(1)}), TINY)
    assert 'wrong shape' in refusal(build_network, snapshot_of({**state, 'steps': torch.zeros(9)}), TINY)
    assert 'and 3 more' in refusal(build_network, snapshot_of({'steps': state['steps'], 'view': state['view']}), TINY)


@pytest.mark.parametrize('system, change', [
    ('edm', {'model_channels': 10 ** 9}), ('edm', {'model_channels': 10 ** 30}), ('edm', {'num_blocks': 10 ** 9}),
    ('edm', {'channel_mult': [10 ** 6]}), ('edm', {'channel_mult': [1] * 10 ** 5}), ('edm', {'label_dim': 10 ** 12}),
    ('edm', {'resample_filter': [1] * 10 ** 5, 'channel_mult': [1, 1]}), ('iddpm', {'M': 10 ** 9}),
    ('edm', {'img_channels': 10 ** 12})])
def test_arguments_that_ask_for_a_huge_network_cost_nothing(system, change):
    net = SYSTEMS[system].network_class(**SMALL)
    before, start = peak_memory(), time.process_time()
    refusal(build_network, snapshot_of(net.state_dict(), system, **{**SMALL, **change}), SYSTEMS)
    assert time.process_time() - start < 5
    assert peak_memory() - before < 300 << 20


def test_mutations_load_or_are_refused(good, tmp_path):
    """And what loads is what was saved, thanks to the checksum."""
    data, path, rng = good.read_bytes(), tmp_path / 'x.safetensors', random.Random(1)
    whole = read_snapshot(good)
    outcomes = collections.Counter()
    start = time.monotonic()
    for _ in range(500):
        path.write_bytes(mutate(data, rng))
        one = time.process_time()
        try:
            snapshot = read_snapshot(path)
            build_network(snapshot, TINY)
            outcomes['loaded'] += 1
            assert all(torch.equal(t, whole.state_dict[name]) for name, t in snapshot.state_dict.items())
            assert (snapshot.network_kwargs, snapshot.kimg) == (whole.network_kwargs, whole.kimg)
        except UserError:
            outcomes['refused'] += 1
        assert time.process_time() - one < 5
        if time.monotonic() - start > 60:
            break
    assert outcomes['loaded'] > 0 and outcomes['refused'] > 5


# -- writing, transfer

def test_what_json_cannot_hold_is_a_mistake_of_the_program(tmp_path):
    with pytest.raises(TypeError):
        save_snapshot(tmp_path / 'x.safetensors', Tiny(), 'tiny', dataset={'labels': {1, 2}})
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_former_snapshot(good, tmp_path):
    path = tmp_path / good.name
    path.write_bytes(good.read_bytes())
    with full_disk(512), pytest.raises(UserError, match='could not write'):
        save_snapshot(path, Tiny(), 'tiny')
    assert path.read_bytes() == good.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_transfer_copies_what_matches_and_leaves_the_rest():
    source, target = Tiny(4).state_dict(), Tiny(4)
    own = {name: t.clone() for name, t in target.state_dict().items()}
    del source['low']
    source['steps'] = torch.zeros(9)
    source['surplus'] = torch.zeros(1)
    target.model = types.SimpleNamespace(output_layers=())
    copied = networks.Precond.transfer(target, source)
    assert sorted(copied) == ['empty', 'tied', 'view', 'weight']
    after = target.state_dict()
    assert torch.equal(after['weight'], source['weight']) and torch.equal(after['low'], own['low'])
    assert target.weight.requires_grad
