"""Stopping and dying: signals, ranks that are killed or hang, jobs that are killed while writing."""

import contextlib
import io
import itertools
import os
import pathlib
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from dnnlib.files import sigterm_exits
from tests import kills
from tests.commands import ROOT, SMALL, free_port, invoke
from tests.kills import check_same, equal, final_state, losses
from torch_utils import distributed as dist
from torch_utils import training_stats
from torch_utils.distributed import LostRank, report_lost_ranks
from torch_utils.signals import EXIT_HUNG, EXIT_STOPPED, StopRequest, Watchdog
from training.health import Health
from training.run_files import saved_files
from training.training_loop import accumulate_gradients, watched_sec

RUN = [*SMALL, '--batch=64', '--grid=0', '--augment=0.12', '--dropout=0.1', '--tick=0.256', '--snap=0', '--dump=0',
       '--seed=3', '--nosubdir', '--auto-resume', '--duration=0.000768']


# -- signals

def wait_for(condition, seconds=60):
    """Return once condition() holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp('whole') / 'run'
    assert invoke('train.py', *RUN, f'--outdir={folder}').exit_code == 0
    return folder


@pytest.fixture
def hangups_heard():
    """SIGHUP as a terminal's programs have it, even if the tests run under nohup."""
    former = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, former)


@pytest.mark.usefixtures('hangups_heard')
@pytest.mark.parametrize('number, during, nimg, tick_nimg', [
    (signal.SIGTERM, 7, 512, 320), (signal.SIGINT, 1, 128, 64), (signal.SIGUSR1, 8, 576, 576),
    (signal.SIGHUP, 7, 512, 320)])
def test_a_signal_saves_and_the_run_goes_on_from_there(number, during, nimg, tick_nimg, whole, tmp_path, monkeypatch):
    """Stopped within a tick or at its end, the resumed run equals the undisturbed one, that tick's statistics too."""
    end_step, former, begin = Health.end_step, signal.getsignal(signal.SIGTERM), StopRequest.__enter__
    requests = []

    def begun(self):
        requests.append(self)
        return begin(self)

    def signalled(self, step, finite, stop):
        if step == during and not stop:
            os.kill(os.getpid(), number)
            wait_for(lambda: requests[0].name)  # the thread that reads signals gets its turn
        end_step(self, step, finite, stop)
    monkeypatch.setattr(StopRequest, '__enter__', begun)
    monkeypatch.setattr(Health, 'end_step', signalled)
    out = invoke('train.py', *RUN, f'--outdir={tmp_path}')
    assert out.exit_code == EXIT_STOPPED and 'continues from there' in out.output, out.output
    progress = final_state(tmp_path)['progress']
    assert (progress['nimg'], progress['tick_nimg']) == (nimg, tick_nimg)
    assert saved_files(tmp_path, 'network-snapshot')
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGTERM) == former  # the former handlers are back
    training_stats.restore({})  # as in a process of its own
    assert invoke('train.py', *RUN, f'--outdir={tmp_path}').exit_code == 0
    check_same(tmp_path, whole)


def test_nohup_is_respected():
    """It starts a program with SIGHUP ignored, and so it must stay."""
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.2)
        assert stop.name is None and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, former)


@pytest.mark.parametrize('kind, ranks, timeout, seconds', [
    ('cpu', 1, None, 0), ('cpu', 2, None, 600), ('cuda', 1, None, 600), ('cpu', 1, 5, 5), ('cuda', 8, 0, 0)])
def test_who_is_watched(kind, ranks, timeout, seconds, monkeypatch):
    monkeypatch.setattr(dist, 'get_world_size', lambda: ranks)
    assert watched_sec(timeout, torch.device(kind)) == seconds


def test_each_round_of_a_step_is_progress():
    """A step of many rounds may take longer than --timeout allows a round."""
    net, beats = torch.nn.Linear(1, 1), []
    net.products = contextlib.nullcontext
    batches = itertools.repeat((torch.ones(2, 1), None))
    accumulate_gradients(net, lambda net, images, *_: net(images), batches, 3, None, 1, lambda: beats.append(1))
    assert len(beats) == 3


def test_training_goes_on_without_a_terminal(tmp_path):
    """Its output is lost in a pipe that nobody reads any more, but not in log.txt."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, 'w') as pipe:
        done = subprocess.run([sys.executable, 'train.py', *SMALL, '--grid=0', '--duration=0.000032', '--nosubdir',
                               f'--outdir={tmp_path}'], cwd=ROOT, stdout=pipe, stderr=pipe, timeout=120)
    assert done.returncode == 0
    assert (tmp_path / 'log.txt').read_text().endswith('Done.\n') and saved_files(tmp_path, 'training-state')


def test_sigterm_exits_and_the_former_handler_is_back():
    former = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as e, sigterm_exits(3):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert e.value.code == 3 and signal.getsignal(signal.SIGTERM) == former


def python(program):
    """Run a small program; returns its exit code, its output, and the seconds it took."""
    start = time.monotonic()
    done = subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr, time.monotonic() - start


def test_a_second_signal_ends_the_process_at_once():
    """It does so even while the main thread is blocked; two signals in quick succession count as one."""
    code, said, seconds = python('''
import os, signal, threading, time
from torch_utils.signals import StopRequest
def send():
    for pause in (0.1, 0.1, 1.5):
        time.sleep(pause)
        print(pause, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
with StopRequest() as stop:
    threading.Thread(target=send).start()
    lock = threading.Lock()
    lock.acquire()
    lock.acquire(timeout=30)
''')
    assert code == 128 + signal.SIGTERM and said.split() == ['0.1', '0.1', '1.5'] and seconds < 20


def test_the_watchdog_ends_a_process_that_hangs_and_shows_where():
    code, said, seconds = python('''
import time
from torch_utils.signals import Watchdog
def stuck():
    time.sleep(30)
with Watchdog(1.6, 'rank 3') as dog:
    time.sleep(2)  # before the first step it does not count
    dog.beat()
    for _ in range(4):
        time.sleep(0.5)
        dog.beat()
    dog.rest()
    time.sleep(2)
    dog.beat()
    print('so far', flush=True)
    stuck()
''')
    assert code == EXIT_HUNG and said.startswith('so far') and seconds < 30
    assert 'rank 3 made no progress for 1.6 seconds' in said and 'in stuck' in said


@pytest.mark.skipif(not hasattr(signal, 'sigwaitinfo'), reason='not on macOS')
def test_loader_processes_leave_signals_to_their_rank():
    """Signals go to the whole process group, and a loader killed by one would take the current step with it."""
    code, said, _ = python('''
import os, subprocess, time, torch
from torch_utils.signals import StopRequest
from training.batches import start_worker
class Numbers(torch.utils.data.IterableDataset):
    def __iter__(self):
        for i in range(1000000):
            yield i
loader = iter(torch.utils.data.DataLoader(Numbers(), num_workers=1, worker_init_fn=start_worker))
next(loader)
with StopRequest() as stop:
    worker = loader._workers[0]
    for name in ('TERM', 'INT', 'USR1'):  # from elsewhere, as torchrun's come
        subprocess.run(['kill', '-' + name, str(worker.pid)], check=True)
    time.sleep(0.5)
    for _ in range(20):
        next(loader)
    assert worker.is_alive() and stop.name is None
    worker.terminate()  # but it obeys its parent
    worker.join(10)
    print('alive' if worker.is_alive() else 'ended')
os._exit(0)
''')
    assert code == 0 and said.split()[-1] == 'ended', said


# -- ranks that die or hang

def two_ranks(folder, port, *options, on_rank1=()):
    """Start two ranks without torchrun, as Slurm's srun does, of a run too long to end by itself."""
    env = {**kills.ENV, 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port), 'WORLD_SIZE': '2'}
    command = [sys.executable, str(ROOT / 'train.py'), *SMALL, '--batch=16', '--grid=0', f'--outdir={folder}',
               '--nosubdir', '--tick=0.064', '--dump=4', '--snap=0', *options]
    ranks = []
    for rank in range(2):
        with open(folder / f'rank{rank}.txt', 'wb') as out:
            ranks.append(subprocess.Popen([*command, *(on_rank1 if rank else [])], stdout=out,
                                          stderr=subprocess.STDOUT,
                                          env={**env, 'RANK': str(rank), 'LOCAL_RANK': str(rank)}))
    return ranks


@pytest.mark.parametrize('number, options, code, sentence', [
    (signal.SIGKILL, [], 71, 'rank 0 lost the connection to another rank'),
    (signal.SIGSTOP, ['--timeout=4'], EXIT_HUNG, 'rank 0 made no progress for 4 seconds')])
def test_a_lost_rank_stops_the_other(number, options, code, sentence, tmp_path):
    ranks = two_ranks(tmp_path, free_port(), *options)
    try:
        said = tmp_path / 'rank0.txt'
        assert kills.until(lambda: 'tick 2' in said.read_text(), ranks[0]), said.read_text()
        ranks[1].send_signal(number)
        start = time.monotonic()
        assert ranks[0].wait(60) == code, said.read_text()
        assert time.monotonic() - start < 40  # the stated time, with room for a busy machine
        assert sentence in said.read_text()
    finally:
        for rank in ranks:
            kills.kill_all(rank)


def test_a_rank_that_fails_says_why_and_stops_the_other(tmp_path):
    ranks = two_ranks(tmp_path, free_port(), on_rank1=['--data=/nowhere/set.zip'])
    try:
        assert [rank.wait(60) for rank in ranks] == [71, 1]
    finally:
        for rank in ranks:
            kills.kill_all(rank)
    said = [(tmp_path / f'rank{i}.txt').read_text() for i in range(2)]
    assert '/nowhere/set.zip' in said[1] and 'Traceback' not in said[1], said[1]
    assert 'rank 0 lost the connection to another rank' in said[0], said[0]


def test_a_killed_rank_is_restarted_by_torchrun(undisturbed, tmp_path):
    """The run, killed up to twice, ends like an undisturbed one; `python -m tests.kills` does it 20 times."""
    assert kills.kill_ranks(tmp_path / 'run', 2, random.Random(1)) >= 1
    check_same(tmp_path / 'run', undisturbed)


def test_a_job_killed_while_it_writes_goes_on(tmp_path):
    """Killed up to three times, it ends like an undisturbed run; `python -m tests.kills` does 50 with two ranks."""
    assert kills.wait(kills.start(tmp_path / 'whole', 1)) == 0
    killed, _ = kills.kill_jobs(tmp_path / 'run', 3, 1, random.Random(1))
    assert killed >= 2
    check_same(tmp_path / 'run', tmp_path / 'whole')


def test_the_comparison_notices_a_difference(whole, undisturbed):
    assert not equal(final_state(whole), final_state(undisturbed)) and losses(whole) != losses(undisturbed)
    assert pathlib.Path(undisturbed, 'training_options.json').exists()


def test_the_former_wakeup_pipe_is_back():
    reader, pipe = os.pipe()
    os.set_blocking(pipe, False)
    former = signal.set_wakeup_fd(pipe)
    with StopRequest():
        pass
    assert signal.set_wakeup_fd(former) == pipe
    os.close(pipe)
    os.close(reader)


def test_a_single_process_has_no_rank_to_lose():
    """PyTorch's loader of data, say, reports a time limit in the same words."""
    with pytest.raises(RuntimeError, match='timed out'), report_lost_ranks():
        raise RuntimeError('DataLoader timed out after 5 seconds')


@pytest.mark.parametrize('reason', [
    'Connection closed by peer [10.0.0.2]:4711', 'Read error: Connection reset by peer', 'writev: Broken pipe',
    'NCCL error: unhandled system error', 'Timed out waiting 1800000ms for recv operation to complete'])
def test_errors_that_mean_a_lost_rank(reason, monkeypatch):
    """What matters stands at the end of a line that may begin with a long path, before many more lines."""
    monkeypatch.setattr(dist, 'get_world_size', lambda: 2)
    with pytest.raises(LostRank, match='run the same command with --auto-resume') as e, report_lost_ranks():
        raise RuntimeError(f"[{'gloo/' * 60}pair.cc:544] {reason}\nException raised from ...")
    assert f'{reason})' in e.value.message


@pytest.mark.parametrize('reason', ['', 'shapes do not match'])
def test_errors_that_do_not(reason, monkeypatch):
    monkeypatch.setattr(dist, 'get_world_size', lambda: 2)
    with pytest.raises(RuntimeError) as e, report_lost_ranks():
        raise RuntimeError(reason)
    assert str(e.value) == reason


def test_outside_the_main_thread_no_handlers_are_installed():
    """Python allows it only there; a run in a thread of a notebook, say, goes on without."""
    def inside():
        with StopRequest() as stop:
            return stop.name, signal.getsignal(signal.SIGTERM)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(inside).result() == (None, signal.getsignal(signal.SIGTERM))


@pytest.mark.skipif(not os.path.isdir('/proc/self/fd'), reason='needs Linux')
def test_a_request_to_stop_leaves_no_pipe_open():
    before = set(os.listdir('/proc/self/fd'))
    with StopRequest():
        pass
    assert set(os.listdir('/proc/self/fd')) <= before


def watchdogs():
    return {thread for thread in threading.enumerate() if thread.name == 'watchdog'}


def test_the_watchdog_goes_home():
    """Otherwise it would end the user's process some time after a run that an error has ended."""
    before = watchdogs()
    with Watchdog(100) as dog:
        dog.beat()
        thread, = watchdogs() - before
    thread.join(2)
    assert not thread.is_alive()


def test_a_watchdog_that_is_switched_off_does_nothing():
    before = watchdogs()
    with Watchdog(0):
        assert watchdogs() <= before


class Gone:
    """The standard error of a process whose terminal or pipe is gone."""

    def write(self, text):
        raise BrokenPipeError(32, 'Broken pipe')


@pytest.mark.parametrize('stderr', ['none', 'gone', 'closed'])
def test_the_watchdog_needs_no_terminal(stderr, monkeypatch):
    """The process ends even if what it says reaches nobody; Python's stderr is None if it was started without one."""
    streams = {'none': None, 'gone': Gone(), 'closed': io.StringIO()}
    streams['closed'].close()
    codes = []
    monkeypatch.setattr(sys, '__stderr__', streams[stderr])
    monkeypatch.setattr(os, '_exit', codes.append)
    Watchdog(1)._end()
    assert codes == [EXIT_HUNG]
