"""generate.py and training.generation: images depend on their seeds alone, and an interrupted run continues."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import PIL.Image
import pytest
import torch

from dnnlib import UserError
from tests.commands import READ_ONLY, ROOT, invoke, refused, run_command, succeed, torchrun
from tests.small_networks import TRAINABLE, few_steps, short_network, tiny_network
from training.dataset import EMBEDDED
from training.generated import RECORD, save_png, write_images
from training.generation import generate_batch, generate_images
from training.networks import EDMPrecond
from training.pixels import to_uint8
from training.samplers import StackedRandomGenerator
from training.scoring import NetworkImages
from training.snapshot import build_network, read_snapshot, save_snapshot
from training.stand_ins import trace
from warm.precond import WarmPrecond
from warm.sources import open_network
from warm.systems import SYSTEMS

TINY = dict(img_resolution=8, img_channels=3, model_type='SongUNet', model_channels=8, channel_mult=[1, 1],
            num_blocks=1)


@pytest.fixture(scope='module')
def networks(tmp_path_factory):
    """Snapshots of small networks with random weights: {name: path}."""
    folder, paths = tmp_path_factory.mktemp('networks'), {}
    for name, system, network_class, kwargs in [
            ('edm', 'edm', EDMPrecond, {}),
            ('warm', 'warm', WarmPrecond, dict(bnr='0.5')),
            ('cond', 'warm', WarmPrecond, dict(bnr='0.5', label_dim=10)),
            ('list', 'warm', WarmPrecond, dict(bnr='0,0.5')),
            ('grey', 'warm', WarmPrecond, dict(img_channels=1))]:
        torch.manual_seed(0)
        net = network_class(**{**TINY, **kwargs})
        for parameter in net.parameters():  # output layers start near zero; make every weight count
            torch.nn.init.normal_(parameter, std=0.1)
        paths[name] = folder / f'{name}.safetensors'
        save_snapshot(paths[name], net.eval(), system, kimg=1)
    return paths


def opened(path):
    """The picture as it is stored, with its file closed."""
    with PIL.Image.open(path) as picture:
        picture.load()
        return picture


def images_in(folder):
    """{name: uint8 pixels} of the finished images; a killed process may have left a temporary file, cut off."""
    return {str(p.relative_to(folder)): np.asarray(opened(p)) for p in sorted(folder.rglob('[0-9]*.png'))}


def assert_same_images(a, b):
    """Assert the same file names, and no pixel that differs by more than one level."""
    assert a.keys() == b.keys() and len(a)
    for name in a:
        assert np.abs(a[name].astype(int) - b[name].astype(int)).max() <= 1, name


@pytest.mark.parametrize('name', ['edm', 'cond'])
def test_images_depend_on_the_seed_alone(tmp_path, networks, name):
    common = [f'--network={networks[name]}', '--seeds=0-8,100', '--steps=4', '--S_churn=10']
    folders = {batch: tmp_path / f'batch{batch}' for batch in (1, 7)}
    for batch, folder in folders.items():
        succeed('generate.py', *common, f'--outdir={folder}', f'--batch={batch}')
    one = images_in(folders[1])
    assert set(one) == {f'{seed:06d}.png' for seed in (*range(9), 100)}
    assert len({image.tobytes() for image in one.values()}) == 10
    assert_same_images(one, images_in(folders[7]))
    if name == 'cond':
        torchrun('generate.py', *common, f'--outdir={tmp_path / "ranks"}', '--batch=3')
        assert_same_images(one, images_in(tmp_path / 'ranks'))


def test_noise_is_identical_whatever_the_batch():
    """An image's latents, class index and sampler noise are the same bit for bit in any batch."""
    def draws(seeds):
        rnd = StackedRandomGenerator('cpu', seeds)
        latents = rnd.randn([len(seeds), 3, 8, 8])
        index = rnd.randint(10, size=[len(seeds)])
        return latents, index, rnd.randn_like(latents.to(torch.float64))
    together, alone = draws([3, 4, 5]), draws([4])
    assert all(torch.equal(a[1:2], b) for a, b in zip(together, alone))


@pytest.mark.filterwarnings('ignore')  # torch's own, from inside its compiler
def test_a_compiled_network_draws_batches_of_one_size(networks):
    """A smaller last batch is drawn at the first one's size, so one graph suffices; each seed gives its image once."""
    source = open_network(networks['cond'], {'num_steps': 2, 'S_churn': 1})
    net, graphs, sizes = source.net, [], []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def sampler(latents, *args):
        sizes.append(len(latents))
        return source.sampler(latents, *args)

    def draw(seeds, **options):
        sizes.clear()
        return {seed: image for batch, images in generate_images(net, seeds, sampler, 8, **options)
                for seed, image in zip(batch, images.numpy())}
    plain = draw(range(20))
    assert sizes == [8, 8, 4] and list(plain) == [*range(20)]
    net.model.compile(backend=count, dynamic=False)
    compiled = draw(range(20))
    assert sizes == [8, 8, 8] and len(graphs) == 1 and list(compiled) == [*range(20)]
    assert list(draw(range(20), wanted={3, 18})) == [3, 18] and sizes == [8, 8] and len(graphs) == 1
    full = draw(range(24))
    assert all((full[seed] == compiled[seed]).all() for seed in range(20))
    assert_same_images(plain, compiled)
    draw(range(3))
    assert sizes == [3]  # fewer seeds than a batch are not padded


def test_class_is_drawn_even_if_given(networks):
    """--class changes the label, not the noise that follows it."""
    seen = []

    def sampler(latents, class_labels, randn_like):
        seen.append((latents, class_labels.argmax(dim=1).tolist(), randn_like(latents)))
        return latents
    net = WarmPrecond(**TINY, label_dim=10)
    generate_batch(net, [1, 2, 3], sampler)
    generate_batch(net, [1, 2, 3], sampler, class_idx=7)
    assert torch.equal(seen[0][0], seen[1][0]) and torch.equal(seen[0][2], seen[1][2])
    assert seen[1][1] == [7, 7, 7] and seen[0][1] != [7, 7, 7]


def test_rounding():
    x = torch.tensor([-2., -1.00392, -1, -0.99, 0, 0.5, 1, 2], dtype=torch.float64)
    assert to_uint8(x).tolist() == [0, 0, 0, 1, 128, 191, 255, 255]


def test_an_interrupted_dump_continues(tmp_path, networks):
    """After a kill, the same command keeps the images that exist and ends with those of an undisturbed run."""
    common = [f'--network={networks["warm"]}', '--seeds=0-99', '--steps=9', '--batch=4']
    folder = tmp_path / 'killed'
    process = subprocess.Popen([sys.executable, str(ROOT / 'generate.py'), *common, f'--outdir={folder}'],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env={**os.environ, 'OMP_NUM_THREADS': '1'})
    while process.poll() is None and len(list(folder.glob('[0-9]*.png'))) < 9:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {p.name: p.stat().st_mtime_ns for p in folder.glob('[0-9]*.png')}
    assert 9 <= len(before) < 100, 'the run ended before it could be killed'
    out = run_command('generate.py', *common, f'--outdir={folder}')
    assert f'{len(before)} of 100 images already exist' in out.stdout
    assert all((folder / name).stat().st_mtime_ns == mtime for name, mtime in before.items())
    succeed('generate.py', *common, f'--outdir={tmp_path / "whole"}')
    assert_same_images(images_in(folder), images_in(tmp_path / 'whole'))


def state_of(folder):
    """{name: content} of all files, to tell that nothing has changed."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}


def test_images_of_other_settings_are_not_mixed(tmp_path, networks):
    base = ['generate.py', f'--outdir={tmp_path}', '--seeds=0-1']
    assert invoke(*base, f'--network={networks["warm"]}', '--steps=2').exit_code == 0
    first, state = images_in(tmp_path), state_of(tmp_path)
    refused(invoke(*base, f'--network={networks["warm"]}', '--steps=3'), 'other options', '--steps=2, now --steps=3',
            '--overwrite')
    refused(invoke(*base, f'--network={networks["list"]}', '--steps=2'), 'another network')
    assert state_of(tmp_path) == state
    assert invoke(*base, f'--network={networks["warm"]}', '--steps=3', '--overwrite').exit_code == 0
    assert any((images_in(tmp_path)[name] != first[name]).any() for name in first)
    assert json.loads((tmp_path / RECORD).read_text())['sampler'] == {'num_steps': 3}


@pytest.mark.parametrize('subdirs', [False, True])
def test_disjoint_seeds_of_other_settings_are_not_mixed(tmp_path, networks, subdirs):
    """The record describes all images of a folder, so those of other seeds must be made alike too."""
    layout = ['--subdirs'] * subdirs
    base = ['generate.py', f'--outdir={tmp_path}', f'--network={networks["cond"]}', *layout]
    assert invoke(*base, '--seeds=0-1', '--steps=2').exit_code == 0
    state = state_of(tmp_path)
    for other in (['--steps=3'], ['--steps=2', '--class=3'], ['--steps=2', '--precision=bf16']):
        refused(invoke(*base, '--seeds=10,2000', *other), 'other options', '--overwrite with --seeds that include 0,1')
        refused(invoke(*base, '--seeds=1,2000', *other, '--overwrite'), 'another --outdir', '--seeds that include 0')
        assert state_of(tmp_path) == state
    if subdirs:
        done = torchrun(*base, '--seeds=10,2000', '--steps=3', ok=False)
        assert done.returncode and 'other options' in done.stderr and 'UserError' not in done.stderr
        assert state_of(tmp_path) == state
    assert invoke(*base, '--seeds=10,2000', '--steps=2').exit_code == 0  # the same settings may be continued
    assert state.items() <= state_of(tmp_path).items() and len(images_in(tmp_path)) == 4
    assert invoke(*base, '--seeds=1', '--steps=2', '--overwrite').exit_code == 0
    assert state.items() <= state_of(tmp_path).items() and len(images_in(tmp_path)) == 4
    assert invoke(*base, '--seeds=0-1,10,2000-2001', '--steps=3', '--overwrite').exit_code == 0
    assert json.loads((tmp_path / RECORD).read_text())['nfe'] == 5 and len(images_in(tmp_path)) == 5


@pytest.mark.parametrize('overwrite', [False, True])
def test_ctrl_c_says_what_is_kept(tmp_path, networks, monkeypatch, overwrite):
    """Ctrl-C gives exit code 130 and keeps the finished images; the command it names for continuing does continue."""
    base = ['generate.py', f'--outdir={tmp_path}', f'--network={networks["warm"]}', '--seeds=0-3', '--steps=2']

    def press(outdir, batches, *args, **kwargs):
        write_images(outdir, iter_once(batches), *args, **kwargs)
        raise KeyboardInterrupt

    def iter_once(batches):
        yield next(batches)
    with monkeypatch.context() as patch:
        patch.setattr('generate.write_images', press)
        out = invoke(*base, '--batch=1', *['--overwrite'] * overwrite)
    refused(out, f'Error: interrupted; the finished images in {tmp_path} are kept, and the same command '
                 f'{"without --overwrite " * overwrite}continues')
    assert out.exit_code == 130 and 'Aborted' not in out.output and set(images_in(tmp_path)) == {'000000.png'}
    assert '1 of 4 images already exist' in invoke(*base, '--batch=1').output


def test_an_interrupted_replacement_does_not_mix(tmp_path, networks, monkeypatch):
    """If --overwrite with other options ends right after the record is written, no old image passes for a new one."""
    base = ['generate.py', f'--outdir={tmp_path}', f'--network={networks["warm"]}', '--seeds=0-3']
    assert invoke(*base, '--steps=2').exit_code == 0

    def fail(*args, **kwargs):
        raise UserError('the power has gone')
    with monkeypatch.context() as patch:
        patch.setattr('generate.write_images', fail)
        refused(invoke(*base, '--steps=3', '--overwrite'), 'the power has gone')
    assert json.loads((tmp_path / RECORD).read_text())['nfe'] == 5 and not images_in(tmp_path)
    assert invoke(*base, '--steps=3').exit_code == 0 and len(images_in(tmp_path)) == 4


@pytest.mark.parametrize('flag', ['--grid=o/grid.png', '--grid=./o/deep/a.png', '--trajectory=o/000000.png',
                                  '--trajectory=link/a.gif'])
def test_pictures_stay_out_of_the_folder(tmp_path, networks, monkeypatch, flag):
    """Inside --outdir, a contact sheet would count as an image, or even take the place of one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'link').symlink_to('o')
    base = ['generate.py', '--outdir=o', f'--network={networks["warm"]}', '--seeds=0-1', '--steps=2']
    assert invoke(*base).exit_code == 0
    state = state_of(tmp_path)
    refused(invoke(*base, flag), f'{flag} lies inside --outdir=o', 'put it beside that folder')
    assert state_of(tmp_path) == state
    assert invoke(*base, '--grid=o.png').exit_code == 0  # only the beginning of the name is the same


def test_kept_images_have_the_networks_size(tmp_path, networks):
    base = ['generate.py', f'--outdir={tmp_path}', f'--network={networks["warm"]}', '--seeds=0-2', '--steps=2']
    assert invoke(*base).exit_code == 0
    first = images_in(tmp_path)
    PIL.Image.new('RGB', [16, 16]).save(tmp_path / '000001.png')
    state = state_of(tmp_path)
    refused(invoke(*base), "000001.png does not match this network's images, which are 8x8 pixels with 3 channel(s)")
    assert state_of(tmp_path) == state
    (tmp_path / '000001.png').unlink()
    assert invoke(*base).exit_code == 0
    assert_same_images(images_in(tmp_path), first)


def test_images_without_a_record(tmp_path, networks):
    """Without a readable record nobody knows how images were made: none are added, and --overwrite spares photos."""
    base = ['generate.py', f'--network={networks["warm"]}', '--steps=2', '--seeds=0-1']
    photos = tmp_path / 'photos'
    (photos / 'deep').mkdir(parents=True)
    PIL.Image.new('RGB', [8, 8]).save(photos / 'deep' / 'cat.jpg')
    state = state_of(photos)
    for overwrite in ([], ['--overwrite']):
        refused(invoke(*base, f'--outdir={photos}', *overwrite), 'no readable generation.json', 'deep/cat.jpg')
    assert state_of(photos) == state
    out = tmp_path / 'out'
    for damage in (lambda record: record.unlink(), lambda record: record.write_text('{"nfe": '),
                   lambda record: record.write_text('[]')):
        assert invoke(*base, f'--outdir={out}', '--overwrite').exit_code == 0
        damage(out / RECORD)
        refused(invoke(*base, f'--outdir={out}'), 'no readable generation.json', 'replace them with --overwrite')
    assert invoke(*base, f'--outdir={out}', '--overwrite').exit_code == 0
    assert json.loads((out / RECORD).read_text())['nfe'] == 3


def test_one_layout_for_a_seed(tmp_path, networks):
    """With --subdirs and without it, an image has two names, and fid.py would count it twice: a folder keeps to one."""
    base = ['generate.py', f'--network={networks["warm"]}', '--steps=1', f'--outdir={tmp_path}', '--seeds=0-2']
    assert invoke(*base, '--subdirs').exit_code == 0
    state = state_of(tmp_path)
    refused(invoke(*base), '000000/000000.png', 'add --subdirs')
    refused(invoke(*base, '--overwrite'), 'add --subdirs')
    assert state_of(tmp_path) == state


def test_more_steps_than_evaluations(tmp_path):
    """iDDPM rounds many noise levels to one, and steps between equal levels take no evaluation."""
    path = tmp_path / 'network-snapshot-000000.safetensors'
    save_snapshot(path, tiny_network('iddpm'), 'iddpm')
    record, drawn = (open_network(path, dict(solver='dpmpp2m', num_steps=200, **options))
                     for options in ({}, {'rho': 7.0}))
    assert record.facts['nfe'] < 200 and drawn.difference(record.facts) is None
    assert drawn.difference({**record.facts, 'sampler': {'num_steps': 10 ** 9}}) is not None


def test_what_makes_no_difference_is_no_other_option(tmp_path, networks):
    """Defaults spelled out, options without effect, and the same file under another name continue a folder."""
    renamed = tmp_path / 'renamed.safetensors'
    renamed.write_bytes(networks['warm'].read_bytes())
    base = ['generate.py', f'--outdir={tmp_path / "o"}']
    assert invoke(*base, f'--network={networks["warm"]}', '--seeds=0').exit_code == 0
    state = state_of(tmp_path / 'o')
    same = [['--steps=18'], ['--bnr=0.5'], ['--bnr-schedule=constant'], ['--solver=heun'], ['--S_churn=0', '--S_min=1'],
            ['--sigma_max=80', '--rho=7', '--eta=0'], ['--precision=fp32']]
    for i, options in enumerate(same, 1):
        out = invoke(*base, f'--network={renamed}', f'--seeds=0-{i}', *options)
        assert out.exit_code == 0 and f'{i} of {i + 1} images already exist' in out.output, out.output
    assert state.items() <= state_of(tmp_path / 'o').items()
    for options in (['--steps=17'], ['--S_churn=1'], ['--solver=euler'], ['--sigma_max=79'], ['--S_churn=1']):
        refused(invoke(*base, f'--network={renamed}', '--seeds=0', *options), 'other options (the defaults, now --')


@pytest.mark.parametrize('name', TRAINABLE)
def test_traces_tell_samplers_apart(name):
    """For every system, defaults spelled out leave the trace as it is; options that change the sampler change it."""
    net, system = short_network(name), SYSTEMS[name]
    given = {**few_steps(name), **({'data': EMBEDDED} if system.starts_from_data else {})}
    given.update({'num_steps': max(given['num_steps'], 3)} if 'num_steps' in given else {})  # with 2, rho has no effect
    own = {option.name: option.default for option in system.own_sample_options if option.default is not None}
    others = [{'num_steps': 1}, {'sigma_max': 79}, {'rho': 6}, {'S_churn': 1}, {'solver': 'euler'}, {'disc': 'vp'},
              {'epsilon_scale': '1.0006'}, {'reverse_step': 'ancestral'}, {'ihdm_delta': 0.02},
              {'eta': 1, 'solver': 'euler'}]
    known = (*system.sample_options, *(option.name for option in system.own_sample_options))

    def traced(options):
        return trace(net, system.make_sampler(net, {**given, **options}))
    plain = traced({})
    assert traced(own) == plain == traced({}) and isinstance(net.model, torch.nn.Module) and net.model.num_blocks
    changed = [plain, *(traced(options) for options in others if set(options) <= set(known))]
    assert len(set(changed)) == len(changed) > 1


def test_records_of_any_content(tmp_path, networks):
    """A record is a file and may hold anything: strange values count as other options and are never computed with."""
    base = ['generate.py', f'--outdir={tmp_path}', f'--network={networks["warm"]}', '--seeds=0', '--steps=2']
    assert invoke(*base).exit_code == 0
    record = json.loads((tmp_path / RECORD).read_text())
    for sampler in (None, [], 'x', {'num_steps': 10 ** 15}, {'num_steps': 'x'}, {'num_steps': [1]}, {'path': 1},
                    {'sigma_max': 1e300}, {'num_steps': 2, 'net': 1}, {'num_steps': -10 ** 400}):
        (tmp_path / RECORD).write_text(json.dumps(dict(record, sampler=sampler)))
        refused(invoke(*base), 'other options')
    (tmp_path / RECORD).write_text('{}')
    refused(invoke(*base), 'another network')


def test_files(tmp_path, networks):
    """--subdirs makes folders of 1000 seeds; one channel is saved as L, three as RGB; --grid is a contact sheet."""
    result = invoke('generate.py', f'--network={networks["grey"]}', f'--outdir={tmp_path / "a"}', '--steps=1',
                    '--seeds=5,1999,2000', '--subdirs', f'--grid={tmp_path / "grid.png"}')
    assert result.exit_code == 0, result.output
    assert set(images_in(tmp_path / 'a')) == {'000000/000005.png', '001000/001999.png', '002000/002000.png'}
    assert opened(tmp_path / 'a/000000/000005.png').mode == 'L'
    assert opened(tmp_path / 'grid.png').size == (2 * 66 + 2, 2 * 66 + 2)
    assert invoke('generate.py', f'--network={networks["edm"]}', f'--outdir={tmp_path / "b"}', '--steps=1',
                  '--seeds=1').exit_code == 0
    assert opened(tmp_path / 'b/000001.png').mode == 'RGB'


def test_edm_snapshot(tmp_path, root):
    """EDM's own class-conditional .pkl is sampled as it is, by EDM's sampler, the ablation sampler and dpmpp2m."""
    pkl = root / 'tests/golden/edm-network-snapshot-000123.pkl'
    for i, options in enumerate([[], ['--class=3'], ['--solver=euler', '--disc=vp', '--schedule=vp', '--scaling=vp'],
                                 ['--solver=dpmpp2m']]):
        out = invoke('generate.py', f'--network={pkl}', f'--outdir={tmp_path / str(i)}', '--steps=3', '--seeds=0-2',
                     *options)
        assert out.exit_code == 0, out.output
        assert images_in(tmp_path / str(i))['000000.png'].shape == (16, 16, 3)


def test_paths_of_one_network(tmp_path, networks):
    """A network for several BNRs draws other images along each, and refuses a BNR that it was not trained on."""
    images = {}
    for bnr in ('0', '0.5'):
        out = invoke('generate.py', f'--network={networks["list"]}', f'--outdir={tmp_path / bnr}', '--steps=3',
                     '--seeds=0', f'--bnr={bnr}')
        assert out.exit_code == 0, out.output
        images[bnr] = images_in(tmp_path / bnr)['000000.png']
    assert (images['0'] != images['0.5']).any()
    refused(invoke('generate.py', f'--network={networks["list"]}', f'--outdir={tmp_path / "x"}', '--bnr=1'),
            'the constant BNRs 0,0.5', 'not constant BNR 1')
    assert not (tmp_path / 'x').exists()


@pytest.mark.parametrize('ending', ['png', 'gif'])
def test_trajectory(tmp_path, networks, ending):
    path = tmp_path / f'watched.{ending}'
    out = invoke('generate.py', f'--network={networks["cond"]}', f'--outdir={tmp_path / "o"}', '--steps=3',
                 '--seeds=0-1', f'--trajectory={path}')
    assert out.exit_code == 0, out.output
    with PIL.Image.open(path) as picture:
        assert getattr(picture, 'n_frames', 1) == (4 if ending == 'gif' else 1)  # three noise levels and the images
        if ending == 'png':
            assert picture.size == (4 * 66 + 2, 8 * 66 + 2)  # a column per level; x, D, R and D + R of two images


def test_watching_changes_nothing(networks):
    """The last frame holds the images that the sampler draws when it is not watched."""
    from training.snapshot import build_network, read_snapshot
    from warm.trajectory import watch
    for name in ('edm', 'cond'):
        snapshot = read_snapshot(networks[name])
        net, system = build_network(snapshot, SYSTEMS), SYSTEMS[snapshot.system]
        frames = watch(net, system, [4, 5], {'num_steps': 4})
        plain = generate_batch(net, [4, 5], system.make_sampler(net, {'num_steps': 4}))
        torch.testing.assert_close(frames[-1].x, plain.to(torch.float32), rtol=0, atol=0)
        assert [f.beta for f in frames] == sorted((f.beta for f in frames), reverse=True) and len(frames) == 5
        assert all(f.alpha == pytest.approx(0.5 * f.beta if name == 'cond' else 0) for f in frames)


BAD = {
    'missing network': ('edm', ['--network=/nowhere/a.safetensors'], '/nowhere/a.safetensors'),
    'not a snapshot': ('edm', ['--network={root}/LICENSE'], 'LICENSE'),
    'class of an unconditional network': ('edm', ['--class=3'], 'unconditional'),
    'a run folder': ('edm', ['--network={networks}'], '{networks} is a folder; give a file'),
    'steps without end': ('edm', ['--steps=1000000'], '--steps=1000000 is more than the 10000 steps'),
    'class out of range': ('cond', ['--class=10'], 'classes 0 to 9'),
    'seeds': ('edm', ['--seeds=1,x'], "'1,x'"),
    'seeds backwards': ('edm', ['--seeds=5-1'], "'5-1' goes backwards"),
    'a seed twice': ('edm', ['--seeds=1,5-7,6'], 'the seed 6 occurs twice'),
    'seeds without end': ('edm', ['--seeds=0-99999999999'], 'more than 10,000,000 numbers'),
    'seeds without end, in parts': ('edm', ['--seeds=0-9999999,10000000'], 'more than 10,000,000 numbers'),
    'a seed without end': ('edm', ['--seeds=' + '9' * 5000], 'is not a list of integers'),
    'grid in a folder that cannot be': ('warm', [f'--grid={READ_ONLY}/none/a.png'],
                                        f'could not create the folder {READ_ONLY}/none'),
    'grid where nobody writes': ('warm', [f'--grid={READ_ONLY}/a.png'], 'choose another folder for a.png'),
    'grid is a folder to be': ('warm', ['--grid=new/'], 'does not end in .png'),
    'grid of another format': ('warm', ['--grid=x.jpg'], '--grid=x.jpg does not end in .png'),
    **{f'empty {flag}': ('warm', [f'{flag}='], f"'{flag}': it is empty")
       for flag in ('--network', '--outdir', '--grid', '--trajectory')},
    'grid is a folder': ('warm', ['--grid={tmp}/folder.png'], 'folder.png is a folder'),
    'trajectory where nobody writes': ('warm', [f'--trajectory={READ_ONLY}/a.gif'], 'choose another folder for a.gif'),
    'ablation of Warm': ('warm', ['--disc=vp'], '--disc is not an option of the Warm sampler'),
    'BNR of EDM': ('edm', ['--bnr=0.5'], '--bnr is not an option of the EDM sampler'),
    'other BNR': ('warm', ['--bnr=0.7'], 'this network knows constant BNR 0.5'),
    'blurring': ('warm', ['--bnr-schedule=blurring'], 'this network knows constant BNR 0.5'),
    'no number': ('warm', ['--bnr=x'], 'Blur-to-Noise'),
    'a range of BNRs': ('warm', ['--bnr=0.1-2'], "'0.1-2' in --bnr is not a single Blur-to-Noise Ratio"),
    'a range with an exponent': ('warm', ['--bnr=1e-2-1'], 'give a number ≥ 0, such as 0.5'),
    'a list of BNRs': ('warm', ['--bnr=0,0.5'], 'a single Blur-to-Noise Ratio'),
    'no blur': ('warm', ['--bnr-schedule=blurring:abc'], "'abc' in --bnr-schedule is not sigma_b_max of the"),
    'multistep with churn': ('warm', ['--solver=dpmpp2m', '--S_churn=4'], 'churn'),
    'multistep with one step': ('warm', ['--solver=dpmpp2m', '--steps=1'], 'at least 2 steps'),
    'eta with heun': ('warm', ['--eta=1'], '--solver=euler'),
    'eta out of range': ('warm', ['--eta=2', '--solver=euler'], 'between 0'),
    'range upside down': ('warm', ['--sigma_min=10', '--sigma_max=1'], '10'),
    'trajectory format': ('warm', ['--trajectory=a.avi'], '.png, .gif, .mp4'),
    'folder is a file': ('warm', ['--outdir={root}/LICENSE'], 'LICENSE'),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_input(tmp_path, networks, root, name):
    network, options, sentence = BAD[name]
    (tmp_path / 'folder.png').mkdir()
    places = dict(root=root, tmp=tmp_path, networks=networks[network].parent)
    options, sentence = [option.format(**places) for option in options], sentence.format(**places)
    refused(invoke('generate.py', f'--network={networks[network]}', f'--outdir={tmp_path / "out"}', *options), sentence)
    assert not (tmp_path / 'out').exists()


def test_missing_video_writer(tmp_path, monkeypatch):
    from warm.trajectory import check_writer
    monkeypatch.setitem(sys.modules, 'imageio_ffmpeg', None)
    with pytest.raises(UserError, match='pip install imageio-ffmpeg'):
        check_writer(tmp_path / 'a.mp4')


def test_full_disk(tmp_path, networks):
    """A failed write ends with an error message, keeps the images before it, and leaves no half-written file."""
    script = ('import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); '
              'resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600)); sys.argv[0] = "generate.py"; '
              'import runpy; runpy.run_path("generate.py", run_name="__main__")')
    done = subprocess.run([sys.executable, '-c', script, f'--network={networks["warm"]}', f'--outdir={tmp_path / "o"}',
                           '--steps=1', f'--grid={tmp_path / "grid.png"}'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    assert 'grid.png' in done.stderr and 'free some space' in done.stderr
    assert len(images_in(tmp_path / 'o')) == 64 and not list(tmp_path.rglob('.tmp*'))


def test_an_image_that_was_cut_off_is_drawn_again(tmp_path, networks):
    """As after a power failure; all others are kept."""
    args = f'--network={networks["warm"]}', f'--outdir={tmp_path / "o"}', '--steps=1', '--seeds=0-4'
    invoke('generate.py', *args)
    whole = (tmp_path / 'o' / '000003.png').read_bytes()
    for size in (0, 50, len(whole) - 1):
        (tmp_path / 'o' / '000003.png').write_bytes(whole[:size])
        assert '4 of 5 images already exist' in invoke('generate.py', *args).output
        assert (tmp_path / 'o' / '000003.png').read_bytes() == whole


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_images_that_are_not_finite_are_refused(value, tmp_path, networks):
    """A cast to pixels would make black or white ones of them, and scores would count these."""
    snapshot = read_snapshot(networks['warm'])
    net = build_network(snapshot, SYSTEMS)
    with torch.no_grad():
        next(net.parameters()).fill_(value)
    save_snapshot(tmp_path / 'bad.safetensors', net, 'warm', kimg=1)
    refused(invoke('generate.py', f'--network={tmp_path / "bad.safetensors"}', f'--outdir={tmp_path / "o"}',
                   '--steps=2', '--seeds=7,9'), 'NaN or infinite values for seed 7 (2 of 2', 'use another snapshot')
    assert not images_in(tmp_path / 'o')
    with pytest.raises(UserError, match='for seed 3 '):
        next(NetworkImages(net, SYSTEMS['warm'].make_sampler(net, {'num_steps': 1}), [3]).batches(range(1), 1))


def test_an_image_that_cannot_get_its_name_leaves_no_file(tmp_path):
    (tmp_path / '000000.png').mkdir()
    with pytest.raises(UserError, match='could not write'):
        save_png(tmp_path / '000000.png', np.zeros([3, 8, 8], np.uint8))
    assert [path.name for path in tmp_path.iterdir()] == ['000000.png']
