"""Several machines, as two torchrun agents on this one."""

import datetime
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch.distributed

from dnnlib import UserError
from tests import kills
from tests.commands import ROOT, SMALL, free_port
from tests.kills import check_same
from torch_utils import distributed as dist
from torch_utils.signals import EXIT_STOPPED


def agent(folder, port, node):
    command = [sys.executable, '-m', 'torch.distributed.run', '--nnodes=2', '--nproc_per_node=1', '--rdzv_backend=c10d',
               f'--rdzv_endpoint=127.0.0.1:{port}', '--rdzv_id=test', f'--rdzv_conf=is_host={1 - node}', '--',
               str(ROOT / 'train.py'), *kills.RUN, f'--outdir={folder}']
    with open(f'{folder}.{node}.txt', 'wb') as out:
        return subprocess.Popen(command, env=kills.ENV, stdout=out, stderr=subprocess.STDOUT)


def test_two_agents_train_as_one_with_two_ranks(undisturbed, tmp_path):
    folder, port = tmp_path / 'run', free_port()
    agents = [agent(folder, port, node) for node in range(2)]
    try:
        for node, process in enumerate(agents):
            assert process.wait(kills.LIFE_SEC) == 0, (tmp_path / f'run.{node}.txt').read_text()
    finally:
        for process in agents:
            kills.kill_all(process)
    check_same(folder, undisturbed)
    assert 'Done.' in (tmp_path / 'run.0.txt').read_text() + (tmp_path / 'run.1.txt').read_text()


def test_ranks_of_a_new_life_do_not_meet_those_of_the_old(monkeypatch):
    """After a restart, ranks share a fresh part of the store, although it still holds what the former ones wrote."""
    from concurrent.futures import ThreadPoolExecutor
    store = torch.distributed.HashStore()
    names = []
    with ThreadPoolExecutor(3) as pool:
        for life in range(3):
            parts = list(pool.map(lambda rank: dist.fresh_store(store, rank, 3), range(3)))
            parts[1].set('where', str(life))
            assert parts[0].get('where') == parts[2].get('where') == str(life).encode()
            names.append({part.get('where') for part in parts})
            assert not parts[0].check(['elsewhere'])
    assert len(names) == 3


def test_without_torchrun_there_is_no_group_and_no_port(monkeypatch):
    for name in ('RANK', 'WORLD_SIZE'):
        monkeypatch.delenv(name, raising=False)
    dist.init()
    assert not torch.distributed.is_initialized() and (dist.get_rank(), dist.get_world_size()) == (0, 1)
    assert 'MASTER_PORT' not in os.environ
    dist.cleanup()


def test_half_of_torchruns_environment(monkeypatch):
    """A batch system may set it so, or an old shell may still have it; the message names what is missing."""
    for name, value in dict(RANK='0', WORLD_SIZE='1', MASTER_PORT='1').items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv('MASTER_ADDR', raising=False)
    with pytest.raises(UserError, match='RANK and WORLD_SIZE are set, but not MASTER_ADDR; start the ranks'):
        dist.init()


@pytest.mark.parametrize('rank, ranks', [('2', '2'), ('-1', '2'), ('one', '2'), ('0', '')])
def test_a_rank_beyond_the_ranks(monkeypatch, rank, ranks):
    """PyTorch would wait for it until the time is up."""
    for name, value in dict(RANK=rank, WORLD_SIZE=ranks, MASTER_ADDR='127.0.0.1', MASTER_PORT='1').items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f'RANK={rank} is none of WORLD_SIZE={ranks} ranks'):
        dist.init()


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setenv('LOCAL_RANK', '2')
    with pytest.raises(UserError, match='no GPU for process 2 .* --nproc_per_node=2'):
        dist.init()


STAND_INS = {
    'srun': '''#!/bin/bash
# Both tasks on this machine; the highest exit code, as srun's, which is 128 + n where a signal n ended a task.
while [[ $1 == --* ]]; do echo "srun $1"; shift; done
for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_NTASKS=2 "$@" & pids[$i]=$!; done
echo "${pids[@]}" > "$TASK_FILE"
code=0
for pid in "${pids[@]}"; do wait "$pid"; c=$?; [ $c -gt $code ] && code=$c; done
exit $code
''',
    'scontrol': '''#!/bin/bash
if [ "$1" = show ]; then echo 127.0.0.1; echo other; else echo "asked to $*"; fi
'''}


@pytest.fixture
def slurm(tmp_path):
    """Functions (submit, said): submit(*options of train.py, **environment) starts the job, said() is its output."""
    bin_dir = tmp_path / 'bin'
    bin_dir.mkdir()
    for name, text in {**STAND_INS, 'python': f'#!/bin/bash\nexec {sys.executable} "$@"\n'}.items():
        (bin_dir / name).write_text(text)
        (bin_dir / name).chmod(0o755)
    env = {**kills.ENV, 'PATH': f"{bin_dir}:{os.environ['PATH']}", 'SLURM_JOB_ID': str(free_port()),
           'SLURM_JOB_NODELIST': 'a,b', 'TASK_FILE': str(tmp_path / 'task')}
    jobs = []

    def submit(*options, **more):
        with open(tmp_path / 'out.txt', 'ab') as out:
            jobs.append(subprocess.Popen(
                ['bash', 'docs/slurm.sbatch', *SMALL, '--batch=16', '--grid=0', '--tick=0.032', '--snap=0', '--dump=0',
                 f'--outdir={tmp_path / "runs"}', '--seed=1', *options],
                cwd=ROOT, env={**env, **more}, stdout=out, stderr=subprocess.STDOUT))
        return jobs[-1]
    yield submit, lambda: (tmp_path / 'out.txt').read_text()
    for job in jobs:
        kills.kill_all(job)


def test_the_slurm_file(slurm, tmp_path):
    """On SIGUSR1 to a task, the job saves and asks to be requeued, however often it was; then it continues."""
    submit, said = slurm
    job = submit('--duration=1', SLURM_RESTART_COUNT='7')
    assert kills.until(lambda: 'tick 3 ' in said(), job), said()
    os.kill(int((tmp_path / 'task').read_text().split()[0]), signal.SIGUSR1)
    assert job.wait(60) == EXIT_STOPPED, said()
    assert said().count('asked to requeue') == 1
    assert kills.wait(submit('--duration=0.00001')) == 0
    assert 'Resuming from' in said() and said().count('asked to requeue') == 1
    assert len(list((tmp_path / 'runs').iterdir())) == 1


@pytest.mark.parametrize('option, code', [('--no-such-option', 2), ('--data=/nowhere/x.zip', 1), ('--batch=15', 1)])
def test_the_slurm_file_does_not_repeat_mistakes(option, code, slurm):
    """It knows the codes of click and of UserError, which need an srun that does not kill the other ranks at once."""
    submit, said = slurm
    assert kills.wait(submit(option)) == code and 'Error: ' in said() and 'requeue' not in said(), said()
    assert 'srun --kill-on-bad-exit=0' in said() and 'srun --wait=120' in said()


@pytest.mark.parametrize('restarts, asked', [('0', 1), ('4', 1), ('5', 0)])
def test_the_slurm_file_repeats_what_may_go_well_the_next_time(restarts, asked, slurm, tmp_path):
    """Killed ranks, as for lack of memory, are requeued five times in all. (Here they die at once, for speed.)"""
    submit, said = slurm
    job = submit('--duration=1', SLURM_RESTART_COUNT=restarts)
    assert kills.until(lambda: (tmp_path / 'task').is_file() and (tmp_path / 'task').read_text(), job), said()
    for pid in (tmp_path / 'task').read_text().split():
        os.kill(int(pid), signal.SIGKILL)
    assert job.wait(60) == 128 + signal.SIGKILL
    assert said().count('asked to requeue') == asked


def test_a_rank_that_does_not_join_is_named(monkeypatch):
    monkeypatch.setattr(dist, 'TIMEOUT', datetime.timedelta(0))
    with pytest.raises(UserError, match='rank 1 of 3 has not joined within 0:00:00; check its output'):
        dist.fresh_store(torch.distributed.HashStore(), 0, 3)


@pytest.mark.parametrize('rank, reason', [(0, 'EADDRINUSE'), (1, 'timed out')])
def test_ranks_that_find_no_rank_0_say_so(rank, reason, monkeypatch):
    """Another program has rank 0's port, or none listens there: a sentence, not a traceback."""
    with socket.socket() as other:
        other.bind(('', 0))
        if rank == 0:
            other.listen()
        port = other.getsockname()[1]
        for name, value in dict(RANK=rank, WORLD_SIZE=2, MASTER_ADDR='127.0.0.1', MASTER_PORT=port).items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(dist, 'TIMEOUT', datetime.timedelta(seconds=0.5))
        with pytest.raises(UserError, match=f'rank {rank} could not join .* 127.0.0.1:{port} .*{reason}.*check that'):
            dist.init()


@pytest.mark.parametrize('name', ['RANK', 'WORLD_SIZE'])
def test_one_half_of_a_rank_is_refused(name, monkeypatch):
    """It would be a second rank 0 in the same folder."""
    alone(monkeypatch)
    monkeypatch.setenv(name, '1')
    with pytest.raises(UserError, match=f'^{name} is set, but not .*MASTER_PORT; start the ranks with torchrun'):
        dist.init()


def test_an_unknown_host_is_named_at_once(monkeypatch):
    """PyTorch would look for it for half an hour."""
    for name, value in dict(RANK=0, WORLD_SIZE=2, MASTER_ADDR='no such host', MASTER_PORT=1).items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match='MASTER_ADDR=no such host is no known host'):
        dist.init()


def alone(monkeypatch):
    """This process without torchrun's environment."""
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'):
        monkeypatch.delenv(name, raising=False)


def test_the_group_is_left_however_the_block_ends(monkeypatch):
    left = []
    alone(monkeypatch)
    monkeypatch.setattr(dist, 'cleanup', lambda: left.append(True))
    with pytest.raises(KeyboardInterrupt), dist.process_group():
        raise KeyboardInterrupt
    assert left


def test_a_reason_that_torchrun_cannot_be_told_is_still_said(monkeypatch, tmp_path):
    """The file that it names may be on a disk that is full or gone."""
    alone(monkeypatch)
    monkeypatch.setenv('TORCHELASTIC_ERROR_FILE', str(tmp_path / 'gone' / 'error.json'))
    with pytest.raises(UserError, match='the reason'), dist.process_group():
        raise UserError('the reason')
