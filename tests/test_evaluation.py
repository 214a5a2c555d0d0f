"""Scores during training: recorded, equal to fid.py's, and without influence on the training; NFE; TensorBoard."""

import sys

import PIL.Image
import pytest
import requests
import torch

from tests.commands import SMALL, invoke, json_lines, refused
from torch_utils import training_stats
from training.dataset import ImageFolderDataset
from training.generation import generate_batch
from training.snapshot import read_snapshot
from training.stand_ins import count_evaluations
from training.status import Status
from warm.systems import SYSTEMS

TRAIN = [*SMALL, '--precond=warm', '--duration=0.000064', '--tick=0.016', '--seed=3', '--ema=0.0001', '--snap=2',
         '--nosubdir']


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """Run folders with scores every other tick, and without."""
    folder = tmp_path_factory.mktemp('runs')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('DNNLIB_CACHE_DIR', str(folder / 'cache'))
        scores = ['--eval=2', '--eval-num=20', '--eval-detector=pixels', '--eval-metrics=fid,pr']
        for name, options in (('scored', scores), ('plain', [])):
            result = invoke('train.py', *TRAIN, f'--outdir={folder / name}', *options)
            assert result.exit_code == 0, result.output
        yield folder


def test_scores_are_recorded(runs):
    """There are scores after ticks 2 and 3 (the last), not after tick 0, and both files have the same."""
    stats = json_lines(runs / 'scored' / 'stats.jsonl')
    scored = [line for line in stats if 'Metrics/FD-pixels-20' in line]
    assert [line['Progress/tick']['mean'] for line in scored] == [2, 3]
    assert set(scored[0]['Metrics/FD-pixels-20']) == {'num', 'mean', 'std'}
    log = [line for line in json_lines(runs / 'scored' / 'metrics.jsonl') if line['metric'] == 'FD-pixels']
    assert [line['value'] for line in log] == [line['Metrics/FD-pixels-20']['mean'] for line in scored]
    assert [line['kimg'] for line in log] == [line['Progress/kimg']['mean'] for line in scored]
    assert log[0]['num_images'] == 20 and log[0]['bnr'] == 0.5 and log[0]['nfe'] == 35 and log[0]['seeds'] == '0-19'


def test_scores_do_not_disturb_the_training(runs):
    """The last snapshot of both runs holds the same weights, bit for bit."""
    name = 'network-snapshot-000000.safetensors'
    a, b = (read_snapshot(runs / folder / name).state_dict for folder in ('scored', 'plain'))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert not (runs / 'plain' / 'metrics.jsonl').exists()


def test_the_last_score_is_that_of_the_last_snapshot(runs, tmp_path):
    """fid.py calc with the same seeds gives the same number, bit for bit."""
    result = invoke('fid.py', 'calc', f'--network={runs / "scored" / "network-snapshot-000000.safetensors"}',
                    '--seeds=0-19', f'--ref={runs / "scored" / "eval-ref.npz"}', '--detector=pixels',
                    '--metrics=fid,pr', f'--log={tmp_path / "log.jsonl"}')
    assert result.exit_code == 0, result.output
    during = json_lines(runs / 'scored' / 'metrics.jsonl')[-3:]
    assert [(x['metric'], x['value']) for x in json_lines(tmp_path / 'log.jsonl')] == [
        (x['metric'], x['value']) for x in during]


@pytest.mark.parametrize('options, sentence', [
    (['--eval-metrics=fic'], "there is no metric 'fic'"),
    (['--eval-metrics=kid'], "'kid' needs at least 1000 images"),
    (['--eval-metrics=is'], "'is' needs class probabilities"),
    (['--eval-detector=nowhere.pt'], 'there is no file nowhere.pt'),
    (['--eval-ref=nowhere.npz'], 'there is no file nowhere.npz')])
def test_bad_input(tmp_path, monkeypatch, options, sentence):
    monkeypatch.setenv('DNNLIB_CACHE_DIR', str(tmp_path / 'cache'))
    refused(invoke('train.py', *TRAIN, f'--outdir={tmp_path / "run"}', '--eval=1', '--eval-num=20',
                   '--eval-detector=pixels', *options), sentence)
    assert not list(tmp_path.rglob('network-snapshot-*'))


def test_reference_of_another_size(runs, tmp_path, monkeypatch):
    """It gives one warning; the reference made of the training data gives none.

    With either, a run opens its data once: of a million images, that takes a minute.
    """
    reference = tmp_path / 'ref.npz'
    data = tmp_path / 'data'
    data.mkdir()
    for i in range(4):
        PIL.Image.new('RGB', (16, 16), (i, 0, 99)).save(data / f'{i}.png')
    assert invoke('fid.py', 'ref', f'--data={data}', f'--dest={reference}', '--detector=pixels').exit_code == 0
    opened, former = [], ImageFolderDataset.__init__
    monkeypatch.setattr(ImageFolderDataset, '__init__', lambda *args, **kwargs: opened.append(former(*args, **kwargs)))
    for options, count in (([f'--eval-ref={reference}'], 1), ([], 0)):
        opened.clear()
        result = invoke('train.py', *TRAIN, f'--outdir={tmp_path / str(count)}', '--duration=0.000016', '--eval=1',
                        '--eval-num=20', '--eval-detector=pixels', *options)
        assert result.exit_code == 0 and result.output.count('Warning: the images have 8x8 pixels') == count
        assert len(opened) == 1


def test_tensorboard_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, 'torch.utils.tensorboard', raising=False)
    monkeypatch.setitem(sys.modules, 'tensorboard', None)
    refused(invoke('train.py', *TRAIN, f'--outdir={tmp_path / "run"}', '--tensorboard'), 'pip install tensorboard')
    assert not (tmp_path / 'run').exists()


def test_event_files(tmp_path, monkeypatch):
    """They have what stats.jsonl has, under the same names."""
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    result = invoke('train.py', *TRAIN, f'--outdir={tmp_path}', '--tensorboard')
    assert result.exit_code == 0, result.output
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    stats = json_lines(tmp_path / 'stats.jsonl')
    assert [e.value for e in events.Scalars('Loss/loss')] == pytest.approx([s['Loss/loss']['mean'] for s in stats])


def test_a_detector_that_cannot_be_had_leaves_no_folder(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise requests.ConnectionError()
    monkeypatch.setattr(requests.Session, 'request', refuse)
    monkeypatch.setenv('DNNLIB_CACHE_DIR', str(tmp_path / 'cache'))
    refused(invoke('train.py', *TRAIN, f'--outdir={tmp_path / "run"}', '--eval=1'), 'could not download')
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('system, options, nfe', [
    ('edm', {}, 35), ('edm', dict(num_steps=5, solver='euler'), 5), ('edm', dict(num_steps=5, S_churn=4.0), 9),
    ('warm', dict(num_steps=40), 79), ('warm', dict(num_steps=6, solver='dpmpp2m'), 6)])
def test_number_of_evaluations(system, options, nfe):
    """It is counted without running the U-Net, which stays in place, and is the same as when it runs."""
    net = SYSTEMS[system].network_class(img_resolution=8, img_channels=1, model_type='SongUNet', model_channels=8,
                                        channel_mult=[1], num_blocks=1).eval()
    model, sampler, calls = net.model, SYSTEMS[system].make_sampler(net, options), []
    assert count_evaluations(net, sampler) == nfe and net.model is model
    net.model.register_forward_hook(lambda *args: calls.append(args))
    generate_batch(net, [0], sampler)
    assert len(calls) == nfe


def test_a_score_is_in_the_line_of_its_tick_alone(tmp_path):
    training_stats.restore({})
    status = Status(tmp_path, 0, 200, 0, torch.device('cpu'))
    status.add({'Metrics/FID-10': 3.0})
    for tick, nimg in enumerate((100, 200)):
        status.end_tick(tick, nimg)
        status.start_tick(nimg)
    assert ['Metrics/FID-10' in line for line in json_lines(tmp_path / 'stats.jsonl')] == [True, False]
