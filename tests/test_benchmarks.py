"""The benchmarks' own numbers and rules (tests/benchmarks): what they count, what they compare, when they refuse."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import psutil
import pytest
import torch
from click.testing import CliRunner

from tests.benchmarks import bench_curves, bench_fid, bench_presets, bench_sample, gpu_all, smoke
from tests.benchmarks.bench_train import Trainer, forward_flops, reference_layers, step_flops, ways, write_zip
from tests.benchmarks.report import compiled_whole
from tests.commands import ROOT
from training import layers
from training.detectors import PixelDetector
from training.provenance import COMMIT_VARIABLE, code_version
from warm.config import ARCHITECTURES

CLI = CliRunner()


# -- which commit

def test_the_commit_of_a_copy_without_git(tmp_path, monkeypatch):
    """In a copy without git an environment variable gives the commit; in a checkout it is ignored."""
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
    """Without a commit, gpu_all.py refuses to start; --commit=REV reaches everything it starts, and its report."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(gpu_all, 'environment', lambda device: dict(commit=gpu_all.os.environ.get(COMMIT_VARIABLE)))
    monkeypatch.setattr(gpu_all, 'run_one', lambda command, limit, log: dict(
        rc=0, output=gpu_all.os.environ[COMMIT_VARIABLE]))
    monkeypatch.setenv(COMMIT_VARIABLE, '')
    out = tmp_path / 'gpu.json'
    refused = CLI.invoke(gpu_all.main, [f'--out={out}'])
    assert refused.exit_code == 1 and '--commit=REV' in refused.output and not out.exists()
    assert CLI.invoke(gpu_all.main, [f'--out={out}', '--commit=abc']).exit_code == 0
    content = json.loads(out.read_text())
    assert content['environment'] == dict(commit='abc')
    assert {run['output'] for run in content['runs'].values()} == {'abc'}


# -- what is started

@pytest.mark.parametrize('call', gpu_all.CALLS)
def test_calls_fit_into_nine_minutes(call):
    """Even if each of its runs takes all the time that it may."""
    assert sum(map(gpu_all.sure_seconds, gpu_all.CALLS[call])) <= gpu_all.SECONDS <= 540


def test_time_counts_from_the_start_of_the_process(tmp_path, monkeypatch):
    """What no longer fits is named."""
    assert 0 <= gpu_all.seconds_old() <= 60
    monkeypatch.setattr(gpu_all, 'seconds_old', lambda: 50)
    out = tmp_path / 'gpu.json'
    assert CLI.invoke(gpu_all.main, [f'--out={out}', '--call=3', '--seconds=69']).exit_code == 0
    assert json.loads(out.read_text())['runs'] == {'train-compiled': dict(rc=None, left_out='no time left')}


def test_time_that_is_left_unused_goes_to_what_follows(tmp_path, monkeypatch):
    """Each run has at least its own seconds, and as much more as those after it do not need."""
    granted = []
    monkeypatch.setattr(gpu_all, 'seconds_old', lambda: 0)
    monkeypatch.setattr(gpu_all, 'run_one', lambda command, limit, log: granted.append(limit) or dict(rc=0))
    monkeypatch.setattr(gpu_all, 'run_benchmark', lambda *a: granted.append(a[1]) or dict(rc=0))
    for seconds in (1000, 300):
        assert CLI.invoke(gpu_all.main, [f'--out={tmp_path}/gpu.json', f'--seconds={seconds}']).exit_code == 0
    sure = [gpu_all.sure_seconds(name) for name in gpu_all.CALLS['1']]
    spared = [[seconds - sum(sure[i + 1:]) for i in range(len(sure))] for seconds in (1000, 300)]  # by all after it
    assert spared[1][0] < 0 < sure[0]  # too little for all
    assert granted == pytest.approx([*map(max, sure, spared[0]), *map(max, sure, spared[1])], abs=5)


def test_packages_carried_to_the_machine_are_found(tmp_path, monkeypatch):
    """The checkout comes before what PYTHONPATH has already."""
    monkeypatch.setenv('PYTHONPATH', '/somewhere/carried')
    said = gpu_all.run_one(['-c', 'import os; print(os.environ["PYTHONPATH"])'], 60, tmp_path / 'run.log')['output']
    assert said.strip() == f'{ROOT}{os.pathsep}/somewhere/carried'


def test_what_was_not_compiled_is_counted():
    """A graph that breaks once, and one that does not; the counts start anew with each call."""
    def breaks(x):
        y = x + 1
        torch._dynamo.graph_break()
        return y * 2

    compiled_whole(dict(compile=True))
    for function, count in ((breaks, 1), (lambda x: x + 1, 0)):
        torch.compile(function, backend='eager')(torch.zeros(1))
        assert compiled_whole(dict(compile=True)) == dict(graph_breaks=count, cuda_graphs_skipped=0)
    assert compiled_whole(None) == compiled_whole(dict(precision='bf16')) == {}


def test_failures_of_tests_are_printed_at_once(tmp_path):
    """What pytest prints at its end is lost if time runs out."""
    (tmp_path / 'test_two.py').write_text('import time\n\ndef test_wrong():\n    assert 1 == 2\n\n'
                                          'def test_long():\n    time.sleep(99)\n')
    result = gpu_all.run_one(['-m', 'pytest', '-q', '-p', 'tests.benchmarks.at_once', '-p', 'no:cacheprovider',
                              str(tmp_path)], 8, tmp_path / 'run.log')
    assert result['rc'] is None and 'assert 1 == 2' in result['output']


def test_what_takes_too_long_is_ended_with_what_it_started(tmp_path, capfd):
    """What it has printed until then is kept and shown. The process it started holds the same file, and is ended."""
    code = ('import subprocess, sys; p = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE); '
            'print("a row", p.pid, flush=True); p.wait()')
    result = gpu_all.run_one(['-c', code], 6, tmp_path / 'run.log')
    assert result['rc'] is None and result['output'].startswith('a row') and ended(int(result['output'].split()[-1]))
    assert (tmp_path / 'run.log').read_text() == result['output'] == capfd.readouterr().out


def test_all_that_a_run_prints_is_kept(tmp_path):
    """The log has all of it, the result its end, with what the run says last."""
    result = gpu_all.run_one(['-c', 'print("first"); print("x" * 10 ** 4); raise SystemExit("a reason")'], 60,
                             tmp_path / 'run.log')
    assert result['rc'] == 1 and result['output'].endswith('xxx\na reason\n') and len(result['output']) == 6000
    assert (tmp_path / 'run.log').read_text() == f'first\n{"x" * 10 ** 4}\na reason\n'


def ended(pid, seconds=10):
    """Whether a process ends within that time."""
    for _ in range(int(20 * seconds)):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGTERM])
def test_what_runs_dies_with_the_call(number, tmp_path):
    """A benchmark that outlives a killed call would share the GPU with the next."""
    log = tmp_path / 'run.log'
    code = ('from dnnlib.files import sigterm_exits; from tests.benchmarks.gpu_all import run_one\n'
            'command = ["-c", "import os, time; print(os.getpid()); time.sleep(99)"]\n'
            f'with sigterm_exits(143): run_one(command, 99, {str(log)!r})')
    call = subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        while not (log.is_file() and log.read_text().endswith('\n')):
            assert call.poll() is None
            time.sleep(0.05)
    finally:
        call.send_signal(number)
    assert call.wait() == (143 if number == signal.SIGTERM else -number) and ended(int(log.read_text()))


@pytest.mark.parametrize('code, rc', [('raise SystemExit(3)', 3), ('import time; time.sleep(99)', None)])
def test_rows_of_a_run_that_fails_are_kept(code, rc, tmp_path):
    """As far as it has written its report, and in the repository too; without one nothing there changes."""
    kept, file = tmp_path / 'kept.json', tmp_path / 'gpu-1-run.json'
    write = ('import json, sys; path = sys.argv[1].removeprefix("--out="); '
             'rows = json.load(open(path))["rows"]; json.dump(dict(rows=rows + ["new"]), open(path, "w"))\n')
    kept.write_text('{"rows": ["old"]}')
    file.write_text('{"rows": ["of another call"]}')
    result = gpu_all.run_benchmark(['-c', code], 1, file, kept)
    assert result['rc'] == rc and result['report'] is None and json.loads(kept.read_text()) == dict(rows=['old'])
    result = gpu_all.run_benchmark(['-c', write + code], 1, file, kept)
    assert result['rc'] == rc and result['report'] == json.loads(kept.read_text()) == dict(rows=['old', 'new'])


def test_the_cuda_tests_are_the_same_everywhere():
    """For `make test-gpu`, and as a command for a machine that has PyTorch already."""
    words = f"-m pytest -q {' '.join(gpu_all.CUDA_TESTS)} -k 'cuda or gpu'"
    assert f'$(PY) {words}\n' in (ROOT / 'Makefile').read_text()
    assert f'python3 {words}`' in (ROOT / 'docs' / 'performance.md').read_text()


def test_the_commands_are_tried_in_spite_of_a_failure(tmp_path, monkeypatch):
    """A step that fails is named; one that needs it is tried after it; with --tiny nothing is compiled."""
    done = []

    def failing(folder, device):
        done.append('fails')
        raise RuntimeError('a reason')
    monkeypatch.setenv('DNNLIB_CACHE_DIR', '')
    monkeypatch.setattr(smoke, 'STEPS', {'fails': (failing, []), 'x --compile': (failing, []),
                                         'next': (lambda folder, device: done.append('next'), ['fails'])})
    result = CLI.invoke(smoke.main, ['--tiny', f'--out={tmp_path}/report.json'])
    assert result.exit_code == 1 and done == ['fails', 'next'] and '1 of 12 rows failed' in result.output
    assert '-- fails: failed, 0.0 s' in result.output and '-- next: ok, 0.0 s' in result.output
    rows = {row['step']: row for row in json.loads((tmp_path / 'report.json').read_text())['rows']}
    assert rows['fails'] == dict(step='fails', error='RuntimeError: a reason') and rows['next']['seconds'] == 0
    assert rows['attention, 256 pixels, as chosen']['difference'] < 0.01


@pytest.mark.parametrize('only, presets', [
    (None, ['cifar10', 'cifar10-cond', 'ffhq', 'lsun-church']), ('cifar10', ['cifar10']),
    ('cifar', ['cifar10', 'cifar10-cond']), ('ffhq, church', ['ffhq', 'lsun-church'])])
def test_which_presets(only, presets):
    """A full name selects that preset alone, even if others contain it; part of a name selects all that contain it."""
    assert bench_presets.chosen_presets(only) == presets


def test_cost_of_other_presets_stays(tmp_path, monkeypatch):
    """Measuring one preset anew, on the same GPU, keeps the others' rows; nothing measured is replaced by less."""
    here, out = dict(gpu='H200', commit='new'), tmp_path / 'cost.json'
    former = [dict(preset=preset, system=system, images_per_second=9.0, hours=1.0)
              for preset in ('cifar10', 'ffhq') for system in ('warm', 'edm')]
    out.write_text(json.dumps(dict(rows=former, environment=dict(gpu='H200', commit='old'))))
    rows = bench_presets.merged([dict(preset='ffhq', system='edm', hours=2.0, commit='new')],
                                bench_presets.former_rows(out, here, tiny=False))
    assert [(row['preset'], row['system'], row['hours'], row['commit']) for row in rows] == [
        ('cifar10', 'warm', 1.0, 'old'), ('cifar10', 'edm', 1.0, 'old'), ('ffhq', 'warm', 1.0, 'old'),
        ('ffhq', 'edm', 2.0, 'new')]
    failed = dict(former[0], images_per_second=None, hours=None, error='no memory')
    assert bench_presets.merged([failed], former) == former and bench_presets.merged([failed], []) == [failed]
    assert bench_presets.former_rows(tmp_path / 'none.json', here, tiny=True) == []
    result = CLI.invoke(bench_presets.main, ['--only=ffhq', '--tiny', f'--out={out}'])
    assert result.exit_code == 1 and 'what was measured on H200' in result.output


# -- what is counted and compared

def test_arithmetic_of_edms_network():
    """All targets are stated in these numbers: GFLOP per image of CIFAR-10 for a training step and an evaluation."""
    network_kwargs = dict(ARCHITECTURES['ddpmpp'], img_resolution=32)
    assert step_flops(network_kwargs) == pytest.approx(127e9, rel=0.01)
    assert forward_flops(network_kwargs) == pytest.approx(42.4e9, rel=0.01)


def test_the_reference_way_is_the_same_training(tmp_path):
    """From one seed, a step of both in float32 gives the same loss and gradients, with every weight of account."""
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
    """It uses neither fused attention nor copied and averaged pixels, in any type; afterwards both are back."""
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
    """The set is drawn in the fastest of EDM's ways and written; its floor is the arithmetic of all its images."""
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
    """Every seed has a file, whether the sampler waits for writing or goes on meanwhile."""
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
    """All images of the zip are scored, at fid.py's batch size; the parts add up to the whole."""
    monkeypatch.setattr(bench_fid, 'random_inception', PixelDetector)
    statistics, distance, whole = bench_fid.measure_scoring(10, 8, 'cpu')
    assert whole['images'] == 10 and whole['batch'] == 64
    assert whole['seconds'] == pytest.approx(statistics['seconds'] + distance['seconds'])
    assert whole['target'] == pytest.approx(20 * 10 / 50_000)


# -- loss curves

class Training:
    """Stands in for a process of train.py: a tick per kimg, a minute per tick; a signal stops it, its state saved."""

    clock, started, flags = [0.0], [], {}

    def __init__(self, command, **kwargs):
        options = dict(flag.lstrip('-').split('=') for flag in command[2:] if '=' in flag)
        self.folder, self.returncode = pathlib.Path(options['outdir']), None
        self.kimg, self.loss = 1000 * float(options['duration']), 1.0 + float(options['precision'] == 'bf16') / 100
        assert {'--auto-resume', '--keep=1', '--compact-state'} <= set(command)
        Training.started.append(self.folder.name)
        Training.flags[self.folder.name] = [flag for flag in command if re.match('--(seed|channels-last)', flag)]

    def wait(self, timeout=None):
        if self.returncode is not None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        stats, until = self.folder / 'stats.jsonl', self.clock[0] + (timeout or float('inf'))
        while len(bench_curves.curve_of(self.folder)) < self.kimg:
            if self.clock[0] + 60 > until:
                self.clock[0] = until
                raise subprocess.TimeoutExpired('train.py', timeout)
            self.clock[0] += 60
            tick = {'Progress/kimg': {'mean': len(bench_curves.curve_of(self.folder)) + 1.0},
                    'Loss/loss': {'mean': self.loss}}
            with open(stats, 'a') as f:
                f.write(json.dumps(tick) + '\n')
        self.returncode = 0

    def send_signal(self, number):
        assert number == signal.SIGTERM
        self.returncode = 75


def test_curves_over_several_calls(tmp_path, monkeypatch):
    """A call ends in time with code 75 and compares what there is; the last finds all finished and starts nothing."""
    monkeypatch.setattr(bench_curves, 'subprocess', types.SimpleNamespace(**{**vars(subprocess), 'Popen': Training}))
    monkeypatch.setattr(bench_curves, 'time', types.SimpleNamespace(monotonic=lambda: Training.clock[0]))
    out = tmp_path / 'report.json'
    line = ['--kimg=8', '--precisions=bf16', f'--outdir={tmp_path}', f'--out={out}', '--minutes=12.4']

    def call():
        Training.started.clear()
        result = CLI.invoke(bench_curves.main, line)
        rows = {row['precision']: row for row in json.loads(out.read_text())['rows']}
        return result, {name: row['run'] for name, row in rows.items()}, rows
    result, runs, rows = call()
    assert result.exit_code == 75 and 'end of: bf16, fp32 in channels-last, fp32 with another seed.' in result.output
    assert runs == {'fp32': 'complete', 'bf16': 'partial: 4 kimg'} and rows['bf16']['ticks'] == 4
    assert rows['bf16']['mean_difference'] == '1.00%' and Training.started == ['fp32', 'bf16']
    result, runs, rows = call()
    assert result.exit_code == 75 and rows['bf16']['ticks'] == 8
    assert Training.started == ['bf16', 'fp32-in-channels-last']
    result, runs, rows = call()
    assert result.exit_code == 0 and set(runs.values()) == {'complete'}
    assert Training.started == ['fp32-with-another-seed']
    assert call()[0].exit_code == 0 and Training.started == []
    assert Training.flags == {'fp32': ['--seed=0'], 'bf16': ['--seed=0'],
                              'fp32-in-channels-last': ['--seed=0', '--channels-last=1'],
                              'fp32-with-another-seed': ['--seed=0', '--seed=1']}


@pytest.mark.parametrize('line, words', [
    (['--minutes=9'], '--minutes needs --outdir'), (['--precisions=bf16,typo'], 'typo: choose from fp32')])
def test_curves_that_cannot_be_compared(line, words):
    result = CLI.invoke(bench_curves.main, line)
    assert result.exit_code == 2 and words in result.output
