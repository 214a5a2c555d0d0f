"""training.training_loop: the recipe's formulas, and complete small runs through train.py."""

import io
import json
import math
import pathlib
import re
import sys
import types

import click
import numpy as np
import PIL.Image
import pytest
import torch

from dnnlib import UserError
from dnnlib.text import format_time
from tests.commands import READ_ONLY, SMALL, invoke, json_lines, refused, run_command, succeed, torchrun
from torch_utils import training_stats
from train import main
from training import training_loop as tl
from training import status as st
from training.dataset import EMBEDDED, ImageFolderDataset, load_embedded
from training.run_folder import next_run_dir, run_name, same_run_dir
from training.snapshot import build_network, read_snapshot, save_snapshot
from training.state import load_state
from training.status import ProgressLine, Status, trim_records
from warm.systems import SYSTEMS


@pytest.fixture(scope='module')
def warm_run(tmp_path_factory):
    """A run of 40 steps with a state in the middle: batch 16, ticks of 0.16 kimg."""
    folder = tmp_path_factory.mktemp('warm')
    run_command('train.py', *SMALL, f'--outdir={folder}', '--precond=warm', '--duration=0.00064', '--tick=0.16',
                '--snap=2', '--dump=2', '--desc=first', '--seed=7', '--augment=0.12', '--dropout=0.1')
    return next(folder.iterdir())


def test_files_of_a_run(warm_run):
    assert warm_run.name == '00000-digits-8x8-uncond-ddpmpp-warm-gpus1-batch16-fp32-first'
    names = {p.name for p in warm_run.iterdir()}
    assert {'training_options.json', 'log.txt', 'stats.jsonl', 'reals.png', 'fakes000000.png',
            'network-snapshot-000000.safetensors', 'training-state-000000.pt'} <= names
    assert not any(name.startswith('.tmp') for name in names)
    options = json.loads((warm_run / 'training_options.json').read_text())
    assert options['system'] == 'warm' and options['network_kwargs']['model_channels'] == 8
    log = (warm_run / 'log.txt').read_text()
    assert log.startswith('No --data given') and 'Loading dataset...' in log
    assert 'Training options' in log and re.search(r'^tick 0 +kimg 0\.0 +time .* sec/tick .* sec/kimg .* '
                                                   r'maintenance .* cpumem .* gpumem .* reserved', log, re.M)


def test_stats_lines(warm_run):
    lines = json_lines(warm_run / 'stats.jsonl')
    assert [line['Progress/tick']['mean'] for line in lines] == list(range(len(lines))) and len(lines) == 5
    for name in ('Loss/loss', 'Loss/denoise', 'Loss/deblur', 'Progress/kimg', 'Timing/total_sec',
                 'Timing/sec_per_tick', 'Timing/sec_per_kimg', 'Timing/maintenance_sec', 'Resources/cpu_mem_gb',
                 'Resources/peak_gpu_mem_gb', 'Resources/peak_gpu_mem_reserved_gb'):
        assert set(lines[0][name]) == {'num', 'mean', 'std'}
    assert lines[0]['Loss/loss']['num'] == 16 * 64 and lines[1]['Loss/loss']['num'] == 10 * 16 * 64
    for line in lines:  # both terms are reported per element, their sum is the loss
        total = line['Loss/denoise']['mean'] + line['Loss/deblur']['mean']
        assert math.isclose(total, line['Loss/loss']['mean'], rel_tol=1e-5)
    assert lines[-1]['Progress/kimg']['mean'] == 0.64 and isinstance(lines[0]['timestamp'], float)


def test_snapshot_of_a_run(warm_run):
    snapshot = read_snapshot(warm_run / 'network-snapshot-000000.safetensors')
    assert snapshot.system == 'warm' and snapshot.dataset['num_images'] == 1797
    net = build_network(snapshot, SYSTEMS)
    assert net.model.map_augment.weight.shape[1] == 9 and net.img_resolution == 8


def states_equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(states_equal(a[k], b[k]) for k in a if k not in ('seconds', 'last_tick'))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(states_equal, a, b))
    return a == b


@pytest.mark.parametrize('ranks', [1, 2])
def test_resume_equals_no_interruption(tmp_path, ranks):
    """A run of 2.048 kimg and one resumed from its state at 1.088 kimg end bit for bit alike."""
    command = [*SMALL, f'--outdir={tmp_path}', '--precond=warm', '--tick=1.024', '--snap=1', '--dump=1', '--seed=3',
               '--augment=0.12', '--dropout=0.1', '--batch=64', '--grid=4', '--cond=1']
    launch = run_command if ranks == 1 else torchrun
    launch('train.py', *command, '--duration=0.002048', '--desc=whole')
    whole = next(tmp_path.glob('*-whole'))
    state = whole / 'training-state-000001.pt'
    assert load_state(state)['progress']['nimg'] == 1088
    launch('train.py', *command, '--duration=0.002048', '--desc=resumed', f'--resume={state}')
    resumed = next(tmp_path.glob('*-resumed'))
    a, b = (load_state(run / 'training-state-000002.pt') for run in (whole, resumed))
    assert states_equal(a, b)
    a, b = (read_snapshot(run / 'network-snapshot-000002.safetensors').state_dict for run in (whole, resumed))
    assert states_equal(a, b)
    last = [json_lines(run / 'stats.jsonl')[-1] for run in (whole, resumed)]
    assert last[0]['Loss/loss'] == last[1]['Loss/loss']
    assert (whole / 'fakes000002.png').read_bytes() == (resumed / 'fakes000002.png').read_bytes()


def test_resume_with_other_ranks_continues_the_data(tmp_path):
    command = [*SMALL, f'--outdir={tmp_path}', '--seed=3', '--batch=64', '--dump=1']
    run_command('train.py', *command, '--duration=0.001', '--desc=one')
    state = next(tmp_path.glob('*-one')) / 'training-state-000001.pt'
    out = torchrun('train.py', *command, '--duration=0.002', f'--resume={state}', '--desc=two')
    assert 'saved by 1 ranks and continues with 2' in out.stdout
    assert load_state(next(tmp_path.glob('*-two')) / 'training-state-000002.pt')['progress']['nimg'] == 2048


def test_accumulation_and_ranks_take_the_same_images(monkeypatch):
    """Together, the ranks read the sequence of images that a single process reads."""
    def images(rank, ranks, start=0):
        monkeypatch.setattr(tl.dist, 'get_rank', lambda: rank)
        monkeypatch.setattr(tl.dist, 'get_world_size', lambda: ranks)
        batches = tl.Batches(load_embedded(), 4, 5, start, {}, torch.device('cpu'))
        return torch.cat([next(batches)[0] for _ in range(3)])
    alone = images(0, 1)[:12]
    assert alone.dtype == torch.float32 and -1 <= alone.min() and alone.max() <= 1
    assert torch.equal(torch.stack([images(0, 2), images(1, 2)], dim=1).flatten(0, 1)[:12], alone)
    assert torch.equal(images(0, 1, start=4)[:8], alone[4:])
    # Also from a start that does not divide by the number of ranks: each image once, none left out.
    both = torch.cat([images(rank, 3, start=7) for rank in range(3)]).flatten(1)
    expected = torch.cat([images(0, 1, start=7 + i) for i in (0, 12, 24)]).flatten(1)
    found = torch.unique(both, dim=0)
    assert torch.equal(found, torch.unique(expected, dim=0)) and len(found) == 36


def test_accumulation_keeps_the_scale_of_the_gradient(tmp_path):
    """Gradients of two rounds of 32 images and of one of 64 have the same scale: same images, other noise draws."""
    norms = []
    for limit in (32, 64):
        succeed('train.py', *SMALL, f'--outdir={tmp_path}', '--batch=64', '--dropout=0', '--augment=0',
                '--duration=0.000064', f'--batch-gpu={limit}', f'--desc={limit}', '--seed=1')
        moments = load_state(next(tmp_path.glob(f'*-{limit}/training-state-*.pt')))['optimizer']['state'].values()
        norms.append(sum(moment['exp_avg'].square().sum() for moment in moments).sqrt())
    assert 0.75 < norms[0] / norms[1] < 1.33


def test_split_batch(monkeypatch):
    monkeypatch.setattr(tl.dist, 'get_world_size', lambda: 4)
    assert tl.split_batch(64) == (16, 16, 1)
    assert tl.split_batch(64, 4) == (16, 4, 4)
    assert tl.split_batch(64, 100) == (16, 16, 1)
    with pytest.raises(UserError, match='--batch=62 does not split evenly over 4 ranks'):
        tl.split_batch(62)
    with pytest.raises(UserError, match='--batch-gpu=5'):
        tl.split_batch(64, 5)


def test_ema_beta():
    assert tl.ema_beta(512, 0, 500_000, 0.05) == 0
    assert tl.ema_beta(512, 10_240, 500_000, 0.05) == pytest.approx(0.5)  # half-life 512 images
    assert tl.ema_beta(512, 10 ** 9, 512_000, 0.05) == pytest.approx(0.5 ** (1 / 1000))
    assert tl.ema_beta(512, 0, 512_000, None) == pytest.approx(0.5 ** (1 / 1000))


def test_update_ema_is_the_weighted_mean():
    a, b = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    expected = [0.9 * x + 0.1 * y for x, y in zip(a.parameters(), b.parameters())]
    a.requires_grad_(False)
    tl.update_ema(a, b, 0.9)
    for got, want in zip(a.parameters(), expected):
        torch.testing.assert_close(got, want.detach())


def test_clean_gradients():
    net = torch.nn.Linear(3, 1, bias=False)
    net.weight.grad = torch.tensor([[math.nan, math.inf, -math.inf]])
    tl.clean_gradients(net)
    assert net.weight.grad.tolist() == [[0, 1e5, -1e5]]
    net.weight.grad = torch.tensor([[8., 16., math.inf]])
    tl.clean_gradients(net, loss_scaling=8)
    assert net.weight.grad.tolist() == [[1, 2, 1e5]]


def test_learning_rate_ramp(tmp_path):
    """The rate is lr·min(nimg/ramp, 1) with nimg before the batch, so the first step has rate 0: no weight changes."""
    succeed('train.py', *SMALL, f'--outdir={tmp_path}', '--duration=0.00064', '--batch=64', '--lr-rampup=0.00128',
            '--lr=0.01', '--seed=0')
    state = load_state(next(tmp_path.glob('*/training-state-*.pt')))
    assert state['optimizer']['param_groups'][0]['lr'] == pytest.approx(0.01 * 576 / 1280)


def test_transfer(tmp_path, warm_run):
    edm = tmp_path / 'edm'
    succeed('train.py', *SMALL, f'--outdir={edm}', '--nosubdir', '--duration=0.0001', '--seed=1')
    snapshot = edm / 'network-snapshot-000000.safetensors'
    out = succeed('train.py', *SMALL, f'--outdir={tmp_path}', '--precond=warm', f'--transfer={snapshot}',
                  '--duration=0.000016', '--desc=t', '--lr-rampup=1', '--snap=1')
    assert 'Transferring from' in out
    source = read_snapshot(snapshot).state_dict
    start = read_snapshot(next(next(tmp_path.glob('*-t')).glob('network-snapshot-*'))).state_dict
    # The first step has learning rate 0: what is saved is what was transferred.
    for name, tensor in source.items():
        if start[name].shape == tensor.shape:
            torch.testing.assert_close(start[name], tensor, rtol=0, atol=0)
    assert not start['map_blur.linear.weight'].any()


def test_dry_run_writes_nothing(tmp_path):
    out = succeed('train.py', *SMALL, f'--outdir={tmp_path / "runs"}', '--precond=warm', '-n')
    assert 'Dry run' in out and '"system": "warm"' in out
    assert not (tmp_path / 'runs').exists()


def test_run_numbers(tmp_path):
    assert pathlib.Path(next_run_dir(tmp_path / 'none', 'x')).name == '00000-x'
    for name in ('00003-a', '00011-b', 'notes', '7-c'):
        (tmp_path / name).mkdir()
    assert pathlib.Path(next_run_dir(tmp_path, 'x')).name == '00012-x'


def test_statistics_over_ranks():
    collector = training_stats.Collector()
    collector.update()
    training_stats.report('x', torch.tensor([1., 2.]))
    training_stats.report('x', 6)
    training_stats.report('y', np.float32(3))
    collector.update()
    assert collector.as_dict()['x'] == {'num': 3, 'mean': 3, 'std': pytest.approx(np.std([1, 2, 6]))}
    assert collector.mean('y') == 3 and math.isnan(collector.mean('z'))
    collector.update()
    assert collector.as_dict() == {}


def test_run_names(tmp_path, monkeypatch):
    """A run is named after its data set, however the path to it is written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'cifar10.v2').mkdir()
    PIL.Image.new('L', (8, 8)).save('cifar10.v2/a.png')
    succeed('dataset_tool.py', '--source=cifar10.v2', '--dest=set-8x8.zip')
    monkeypatch.chdir('cifar10.v2')
    for path, name in (('.', 'cifar10.v2'), ('../cifar10.v2', 'cifar10.v2'), ('../cifar10.v2/', 'cifar10.v2'),
                       ('../set-8x8.zip', 'set-8x8'), ('/nowhere/set.v2.zip', 'set.v2')):
        config = dict(dataset_kwargs=dict(path=path, use_labels=False), system='edm', batch_size=16,
                      accelerate_kwargs=dict(precision='fp32'))
        assert run_name(config, 'ddpmpp') == f'{name}-uncond-ddpmpp-edm-gpus1-batch16-fp32'
        assert path.startswith('/nowhere') or ImageFolderDataset(path).name == name


@pytest.mark.parametrize('values', [[0.1] * 7, [1e20] * 3, [-3e15] * 9])
def test_statistics_of_equal_numbers(values):
    """Their standard deviation is 0 up to rounding, never −0 or NaN, even where squares exceed float32's range."""
    training_stats.report('x', torch.tensor(values))
    collector = training_stats.Collector()
    collector.update()
    std = collector.as_dict()['x']['std']
    assert math.copysign(1, std) == 1 and std <= 1e-7 * abs(values[0])


def test_a_length_between_floats_is_met_exactly(tmp_path):
    """9 steps of 223 images make 2.007 kimg, although 2.007·1000 exceeds 2007 in float64."""
    run = [*SMALL, f'--outdir={tmp_path}', '--nosubdir', '--batch=223', '--duration=0.002007', '--grid=0']
    assert invoke('train.py', *run).exit_code == 0
    assert load_state(tmp_path / 'training-state-000002.pt')['progress']['nimg'] == 2007


NUMBERS = [option.opts[0] for option in main.params if isinstance(option.type, click.types.FloatParamType)]
TEXTS = ['--outdir', '--data', '--desc', '--transfer', '--resume', '--eval-ref', '--eval-detector', '--eval-metrics']
BAD = {
    'two ranks, odd batch': (['--batch=15'], 'does not split evenly over 2 ranks', True),
    'two ranks, no folder': ([f'--outdir={READ_ONLY}/none'], f'could not create the folder {READ_ONLY}/none', True),
    'no labels': (['--cond=1', '--data={unlabelled}'], 'has no labels', False),
    'missing data': (['--data=/nowhere/x.zip'], '/nowhere/x.zip', False),
    'missing state': (['--resume=/nowhere/training-state-000001.pt'], '/nowhere', False),
    'missing snapshot': (['--transfer=/nowhere/network-snapshot-000001.pkl'], '/nowhere', False),
    'both': (['--transfer=a', '--resume=b'], 'give one of them', False),
    'option of another system': (['--precond=edm', '--bnr=0.5'], '--bnr is not an option of --precond=edm', False),
    'negative BNR': (['--precond=warm', '--bnr=-1'], 'a number from 0', False),
    'huge BNR': (['--precond=warm', '--bnr=1e30'], 'from 0 to 1000', False),
    'dropout of all': (['--dropout=1'], "'--dropout'", False),
    'unknown augmentation': (['--augment-with=foo'], "no --augment-with 'foo'", False),
    'no BNR': (['--precond=warm', '--bnr=warm'], 'is not a Blur-to-Noise Ratio', False),
    'empty range': (['--precond=warm', '--bnr=2-0.1'], 'is empty', False),
    'duplicates': (['--precond=warm', '--bnr=0.1,0.5,0.1'], 'repeats a value', False),
    'unknown targets': (['--precond=warm', '--targets=nothing'], 'is not one of', False),
    **{f'{flag}={value}': ([f'{flag}={value}'], sentence, False) for flag, value, sentence in [
        *((flag, 'nan', "'nan' is not a finite number") for flag in NUMBERS), ('--duration', 'inf', "'inf' is not a"),
        ('--sigma-blur-max', 'inf', "'inf' is not a finite number"), ('--targets', '', 'is not one of'),
        *((flag, '', 'it is empty') for flag in TEXTS), ('--data', ' ', 'it is empty'), ('--bnr', '', 'it is empty'),
        ('--desc', 'a/b', 'nested folders'), ('--desc', '..\\b', 'nested folders'),
        ('--eval-ref', 'x.npz', '--eval-ref has no effect without scores; add --eval=TICKS'),
        ('--eval-num', '50', '--eval-num has no effect'), ('--eval-metrics', 'fid', '--eval-metrics has no effect'),
        ('--eval-detector', 'pixels', '--eval-detector has no effect'),
        ('--transfer', 'README.md', 'is not a network snapshot')]},
    'no metric': (['--eval=1', '--eval-metrics=foo'], "there is no metric 'foo'", False),
    'no detector': (['--eval=1', '--eval-detector=nope'], "there is no detector 'nope'", False),
    'no detector file': (['--eval=1', '--eval-detector=/nowhere/x.pt'], 'there is no file /nowhere/x.pt', False),
    'no reference': (['--eval=1', '--eval-ref=/nowhere/x.npz'], 'there is no file /nowhere/x.npz', False),
    'no probabilities': (['--eval=1', '--eval-detector=pixels', '--eval-metrics=is'], 'class probabilities', False),
    'few images': (['--eval=1', '--eval-metrics=kid', '--eval-num=50'], "'kid' needs at least 1000 images", False),
    'image too small': (['--cres=1,1,1,1,1'], '8', False),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_input(tmp_path, name):
    options, sentence, two_ranks = BAD[name]
    if '--data={unlabelled}' in options:
        succeed('dataset_tool.py', f'--source={EMBEDDED}', f'--dest={tmp_path / "u"}', '--max-images=8')
        (tmp_path / 'u' / 'dataset.json').write_text('{"labels": null}')
        options = [o.format(unlabelled=tmp_path / 'u') for o in options]
    command = ['train.py', *SMALL, f'--outdir={tmp_path / "runs"}', '--duration=0.0001', *options]
    if two_ranks:
        out = torchrun(*command, ok=False)
        assert out.returncode != 0 and sentence in out.stderr.split('Root Cause')[1]  # torchrun's report, at the end
    else:
        refused(invoke(*command), sentence)
    assert not (tmp_path / 'runs').exists()


def test_a_dry_run_looks_at_the_folder(tmp_path):
    (tmp_path / 'file').touch()
    for folder in (tmp_path / 'file', tmp_path / 'file' / 'runs', f'{READ_ONLY}/runs'):
        refused(invoke('train.py', '-n', f'--outdir={folder}'), 'could not create the folder', 'another --outdir')
    assert invoke('train.py', '-n', f'--outdir={tmp_path / "a" / "b"}').exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ['file']


def test_ctrl_c_during_set_up(monkeypatch, tmp_path):
    def interrupted(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr('train.decode_in_advance', interrupted)
    result = invoke('train.py', f'--outdir={tmp_path / "runs"}')
    assert result.exit_code == 130 and not (tmp_path / 'runs').exists()
    assert result.stderr.startswith('Error: interrupted; still setting up') and 'Aborted' not in result.output


def test_numbers_are_all_checked():
    """Numbers must be finite, the systems' own options included; only generate.py's S_max may be infinite."""
    assert {'--lr', '--ema', '--tick', '--duration', '--timeout', '--rest-weight'} <= set(NUMBERS)
    refused(invoke('generate.py', '--network=x', '--outdir=y', '--S_max=nan'), "'nan' is not a finite number")
    refused(invoke('generate.py', '--network=x', '--outdir=y', '--S_noise=inf'), "'inf' is not a finite number")
    refused(invoke('generate.py', '--network=/nowhere/x', '--outdir=y', '--S_max=inf'), '/nowhere/x')


def test_what_does_not_fit_leaves_no_folder(tmp_path):
    """Weights of another network and images of mixed sizes are refused before the run folder is made."""
    runs = [*SMALL, f'--outdir={tmp_path / "runs"}', '--duration=0.0001']
    torch.manual_seed(0)
    net = SYSTEMS['edm'].network_class(img_resolution=8, img_channels=3, model_type='DhariwalUNet', model_channels=16,
                                       channel_mult=[1])
    snapshot = tmp_path / 'network-snapshot-000001.safetensors'
    save_snapshot(snapshot, net, 'edm')
    refused(invoke('train.py', *runs, f'--transfer={snapshot}'), "only 0 of this network's",
            '8 pixels and 3 channels, the data')
    net = SYSTEMS['edm'].network_class(img_resolution=8, img_channels=1, model_type='DhariwalUNet', model_channels=16,
                                       channel_mult=[1])
    save_snapshot(snapshot, net, 'edm')
    refused(invoke('train.py', *runs, f'--transfer={snapshot}'), "only 0 of this network's", '--arch')
    (tmp_path / 'mixed').mkdir()
    for name, size in (('a', 8), ('b', 16)):
        PIL.Image.new('L', (size, size)).save(tmp_path / 'mixed' / f'{name}.png')
    refused(invoke('train.py', *runs, f'--data={tmp_path / "mixed"}'), 'a.png', '8x8', 'b.png', '16x16')
    assert not (tmp_path / 'runs').exists()


def test_scores_that_are_switched_off_by_hand(tmp_path):
    """With an explicit --eval=0, the other --eval flags are accepted without effect."""
    assert invoke('train.py', '-n', '--eval=0', '--eval-num=50').exit_code == 0
    assert invoke('train.py', '-n', '--eval=1', '--eval-num=50').exit_code == 0


def test_seed_0_is_a_seed(tmp_path):
    assert '"seed": 0,' in succeed('train.py', f'--outdir={tmp_path}', '--seed=0', '--dry-run')


def test_a_drawn_seed_is_rank_0s(tmp_path, monkeypatch):
    """Ranks that drew a seed each would deal out different training orders."""
    monkeypatch.setattr(tl.dist, 'broadcast_object', lambda value: 123 if isinstance(value, int) else value)
    assert '"seed": 123,' in succeed('train.py', f'--outdir={tmp_path}', '--dry-run')


def test_statistics_keep_no_graph():
    """Otherwise the graph of every loss would stay in memory until the tick ends."""
    training_stats.restore({})
    training_stats.report('x', torch.ones(3, requires_grad=True) * 2)
    assert not training_stats.unread()['x'].requires_grad
    training_stats.restore({})


def test_run_numbers_beyond_five_digits(tmp_path):
    """The next folder, and the newest of one name, are found by number, not by text."""
    for name in ('99999-a', '100000-a', '100001-b'):
        (tmp_path / name).mkdir()
    assert pathlib.Path(next_run_dir(tmp_path, 'x')).name == '100002-x'
    assert pathlib.Path(same_run_dir(tmp_path, 'a')).name == '100000-a'


def a_terminal(monkeypatch):
    """What is written to the terminal from now on."""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, 'stderr', terminal)
    return terminal


def test_the_progress_line_shows_this_runs_speed(monkeypatch):
    """After a resume, images that were seen before do not count."""
    terminal, line = a_terminal(monkeypatch), ProgressLine(1000, 3000)
    line.began -= 1000
    line.show(2000)
    assert '2.0 of 3 kimg, 1.0 images/s, 16m 40s left' in terminal.getvalue()


def test_maintenance_is_the_time_between_ticks(tmp_path):
    status = Status(tmp_path, 0, 100, 1000.0, torch.device('cpu'))
    status.end_tick(0, 100)
    status.start_tick(100)
    assert 0 <= status.maintenance < 100


def test_a_clock_that_is_set_back_makes_no_time_negative(tmp_path, monkeypatch):
    """States with negative seconds would be refused, all of them."""
    status = Status(tmp_path, 0, 100, 0.0, torch.device('cpu'))
    monkeypatch.setattr(st.time, 'time', lambda: 0.0)
    status.end_tick(0, 100)
    fields = status.fields(0, 100)
    assert status.elapsed() >= 0 and status.tick_seconds() >= 0 and fields['Timing/sec_per_kimg'] >= 0


def test_times_as_status_lines_say_them():
    assert [format_time(s) for s in (59.4, 60, 3599, 3600, 86399, 86400)] == [
        '59s', '1m 00s', '59m 59s', '1h 00m 00s', '23h 59m 59s', '1d 00h 00m']


def test_the_progress_line_changes_once_a_second(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(st, 'time', types.SimpleNamespace(monotonic=lambda: now[0]))
    terminal, line = a_terminal(monkeypatch), ProgressLine(0, 3000)
    for now[0] in (1000.5, 1001.0, 1001.75):
        line.show(1000)
    assert terminal.getvalue().count('kimg') == 2


def test_the_progress_line_makes_way_for_others(monkeypatch):
    terminal, line = a_terminal(monkeypatch), ProgressLine(0, 3000)
    line.clear()
    assert terminal.getvalue() == ''  # nothing was shown yet
    line.show(1000)
    line.clear()
    shown, blank = terminal.getvalue().strip('\r').replace('\r\r', '\r').split('\r')
    assert len(blank) >= len(shown) and not blank.strip()


def test_a_tick_clears_the_progress_line(monkeypatch, tmp_path):
    terminal = a_terminal(monkeypatch)
    status = Status(tmp_path, 0, 3000, 0, torch.device('cpu'))
    status.line.show(1000)
    status.end_tick(0, 1000)
    assert terminal.getvalue().endswith('\r' + ' ' * 79 + '\r')


def test_other_ranks_report_nothing(monkeypatch, tmp_path):
    terminal = a_terminal(monkeypatch)
    monkeypatch.setattr(tl.dist, 'get_rank', lambda: 1)
    status = Status(tmp_path, 0, 3000, 0, torch.device('cpu'))
    status.line.show(1000)
    status.end_tick(0, 1000)
    status.start_tick(1000)
    assert terminal.getvalue() == '' and not list(tmp_path.iterdir())


def test_time_before_a_resume_counts(tmp_path):
    assert 1000 <= Status(tmp_path, 0, 3000, 1000.0, torch.device('cpu')).elapsed() < 1100


def test_seconds_per_kimg_are_the_ticks_own(tmp_path):
    status = Status(tmp_path, 1000, 9000, 0, torch.device('cpu'))
    for tick, nimg in enumerate((3000, 7000)):
        status.ended = status.tick_time + 6
        assert status.fields(tick, nimg)['Timing/sec_per_kimg'] == pytest.approx((3, 1.5)[tick])
        status.start_tick(nimg)


@pytest.mark.parametrize('rank', [0, 1])
def test_event_files_are_written_at_each_tick_by_rank_0(rank, tmp_path, monkeypatch):
    """With a stand-in for TensorBoard, which need not be installed."""
    class Writer(list):
        def __init__(self, run_dir):
            self.add_scalar = lambda name, value, global_step: self.append((name, global_step))
            self.flush = lambda: self.append('flushed')
    stand_in = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', stand_in)
    monkeypatch.setattr(torch.utils, 'tensorboard', stand_in, raising=False)
    monkeypatch.setattr(tl.dist, 'get_rank', lambda: rank)
    status = Status(tmp_path, 0, 3000, 0, torch.device('cpu'), tensorboard=True)
    status.end_tick(0, 1000)
    status.start_tick(1000)
    if rank:
        assert status.writer is None
    else:
        assert ('Progress/tick', 1000) in status.writer and status.writer[-1] == 'flushed'


def test_records_with_damaged_bytes_are_cut_all_the_same(tmp_path):
    """A crash of the machine may leave any bytes in them."""
    for name in ('log.txt', 'stats.jsonl'):
        (tmp_path / name).write_bytes(b'\xff\xfe\x00\n')
    trim_records(tmp_path, 1, {'Progress/tick': {'mean': 0.0}})
    assert [line['Progress/tick']['mean'] for line in json_lines(tmp_path / 'stats.jsonl')] == [0]


def test_records_that_cannot_be_read(tmp_path):
    (tmp_path / 'stats.jsonl').mkdir()
    with pytest.raises(UserError, match='could not read stats.jsonl in .*; check its permissions'):
        trim_records(tmp_path, 1, {})
