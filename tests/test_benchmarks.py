"""The benchmarks' own numbers and rules (tests/benchmarks): what they count, what they compare, when they refuse."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner

from tests.benchmarks import bench_fid, bench_sample, gpu_all
from tests.benchmarks.bench_train import Trainer, forward_flops, reference_layers, step_flops, ways, write_zip
from tests.commands import ROOT
from training import layers
from training.detectors import PixelDetector
from training.provenance import COMMIT_VARIABLE, code_version
from warm.config import ARCHITECTURES

CLI = CliRunner()


# -- which commit

def test_the_commit_of_a_copy_without_git(tmp_path, monkeypatch):
    """The variable tells it there, and nowhere else."""
    for folder in ('dnnlib', 'torch_utils', 'training'):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns('__pycache__'))

    def version():
        code = 'from training.provenance import code_version; print(code_version())'
        return subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True,
                              check=True).stdout.strip()
    monkeypatch.delenv(COMMIT_VARIABLE, raising=False)
    here = code_version()
    assert version() == 'None'
    monkeypatch.setenv(COMMIT_VARIABLE, 'v1-2-gabc')
    assert version() == 'v1-2-gabc'
    if (ROOT / '.git').exists():
        assert code_version() == here


def test_nothing_is_measured_on_a_gpu_without_a_commit(tmp_path, monkeypatch):
    """Otherwise --commit reaches all that is started, and the report."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(gpu_all, 'environment', lambda device: dict(commit=gpu_all.os.environ.get(COMMIT_VARIABLE)))
    monkeypatch.setattr(gpu_all, 'run_one', lambda command, limit: dict(
        rc=0, output=gpu_all.os.environ[COMMIT_VARIABLE]))
    monkeypatch.setenv(COMMIT_VARIABLE, '')
    out = tmp_path / 'gpu.json'
    refused = CLI.invoke(gpu_all.main, [f'--out={out}'])
    assert refused.exit_code == 1 and '--commit=REV' in refused.output and not out.exists()
    assert CLI.invoke(gpu_all.main, [f'--out={out}', '--commit=abc']).exit_code == 0
    content = json.loads(out.read_text())
    assert content['environment'] == dict(commit='abc')
    assert {run['output'] for run in content['runs'].values()} == {'abc'}


# -- what is counted and compared

def test_arithmetic_of_edms_network():
    """The numbers that all targets are stated in: GFLOP an image of CIFAR-10, a training step and an evaluation."""
    network_kwargs = dict(ARCHITECTURES['ddpmpp'], img_resolution=32)
    assert step_flops(network_kwargs) == pytest.approx(127e9, rel=0.01)
    assert forward_flops(network_kwargs) == pytest.approx(42.4e9, rel=0.01)


def test_the_reference_way_is_the_same_training(tmp_path):
    """Loss and gradients of a step of both in float32, from one seed, every weight of account."""
    data, results = f'{tmp_path}/data.zip', []
    write_zip(data, 16, 8)
    network_kwargs = dict(img_resolution=8, model_type='SongUNet', model_channels=16, channel_mult=[1, 2], num_blocks=1,
                          attn_resolutions=[8], dropout=0.1)
    for name in ('reference', 'fp32'):
        way = ways('cpu', compile=False)[name]
        trainer = Trainer(way.system, way.options, network_kwargs, data, 4, 'cpu')
        for parameter in trainer.net.parameters():  # the last layers begin near zero
            torch.nn.init.normal_(parameter, std=0.1)
        loss = trainer.step()
        trainer.batches.close()
        results.append([loss, *(p.grad for p in trainer.net.parameters())])
    for reference, other in zip(*results):
        assert reference.abs().max() > 0
        assert (reference - other).norm() <= 1e-5 * reference.norm()


def test_the_reference_way_computes_as_edm_does(monkeypatch):
    """Neither the fused attention nor pixels copied and averaged, in whatever type; afterwards they are back."""
    called = []
    for name in ('pool', 'double'):
        monkeypatch.setattr(layers, name, lambda x, f=getattr(layers, name), name=name: called.append(name) or f(x))
    fused = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, 'scaled_dot_product_attention',
                        lambda *args: called.append('fused') or fused(*args))
    x, qkv = torch.randn([2, 4, 8, 8], dtype=torch.bfloat16), torch.randn([2, 12, 4, 4])
    up, down = (layers.Conv2d(4, 4, 0, **{way: True}) for way in ('up', 'down'))
    with reference_layers():
        reference = up(x), down(x), layers.attend(qkv, 1)
    assert called == []
    quick = up(x), down(x), layers.attend(qkv, 1)
    assert called == ['double', 'pool', 'fused']
    for a, b in zip(reference, quick):
        torch.testing.assert_close(a, b)


# -- sampling

def test_a_whole_set_of_images_has_a_row(tmp_path):
    """Drawn in the fastest of EDM's ways and written; the floor is the arithmetic of all of them."""
    out = tmp_path / 'report.json'
    sizes = ['--cbase=8', '--cres=1', '--blocks=1', '--size=8', '--batch=4', '--repeats=1', '--steps=2']
    assert CLI.invoke(bench_sample.main, [*sizes, '--total=10', f'--out={out}']).exit_code == 0
    content = json.loads(out.read_text())
    rows, settings = {row['way']: row for row in content['rows']}, content['settings']
    whole, = (row for name, row in rows.items() if name.startswith('10 images: '))
    named = whole['way'].removeprefix('10 images: ').removesuffix(', written behind it')
    assert rows[named]['images_per_second'] == max(rows[name]['images_per_second'] for name in ('fp32', 'bf16'))
    assert whole['images'] == 10 and whole['unit'] == 'elapsed' and rows['reference']['ratio'] == 1
    for row in rows.values():
        floor = row['images'] * settings['flops'] / (1e12 * settings['matrix_tflops'])
        assert row['times_floor'] == pytest.approx(row['seconds'] / floor)


def test_what_the_writers_are_given(tmp_path):
    """Every seed's file, by the sampler that waits and behind it."""
    kwargs = dict(ARCHITECTURES['ddpmpp'], img_resolution=8, model_channels=8, channel_mult=[1], num_blocks=1)
    drawer = bench_sample.Drawer(kwargs, steps=1, batch=4, device='cpu')
    choices = bench_sample.ways('cpu', compile=False)
    for name, stem in (('reference', '{}'), ('bf16, written behind it', '{:06d}')):
        (tmp_path / name).mkdir()
        drawer.draw(choices[name], 6, tmp_path / name)
        assert {path.name for path in (tmp_path / name).iterdir()} == {f'{stem.format(i)}.png' for i in range(6)}
    assert len(drawer.made) == 2 and drawer.network(choices['bf16']) is drawer.network(choices[name])


# -- scoring

def test_a_whole_scoring_has_rows(monkeypatch):
    """All images of the zip, at fid.py's batch; the parts make up the whole."""
    monkeypatch.setattr(bench_fid, 'random_inception', PixelDetector)
    statistics, distance, whole = bench_fid.measure_scoring(10, 8, 'cpu')
    assert whole['images'] == 10 and whole['batch'] == 64
    assert whole['seconds'] == pytest.approx(statistics['seconds'] + distance['seconds'])
    assert whole['target'] == pytest.approx(20 * 10 / 50_000)
