"""Continuing a run: where --resume and --auto-resume start, what they leave in the records, what is kept on disk."""

import json
import os
import pathlib
import shutil
import stat
import threading
import time
import types

import numpy as np
import pytest
import torch

from dnnlib import UserError
from tests.commands import READ_ONLY, SMALL, full_disk, invoke, refused, succeed
from tests.kills import check_same, equal, final_state, losses
from torch_utils import distributed as dist
from torch_utils import training_stats
from training import saving, training_loop
from training.dataset import EMBEDDED
from training.health import Health
from training.progress import (MALFORMED, check_origin, checked_seed, load_optimizer, load_run_state, random_state,
                               seed_rank, warn_if_dataset_changed)
from training.run_files import OPTIONS_NAME, saved_files
from training.run_folder import check_run_dir, create_run_dir, start_point
from training.saving import MAX_WAITING, Saver, find_states, host_copy, prune
from training.snapshot import read_snapshot
from training.state import load_state, save_state
from warm.systems import SYSTEMS

# 64 images per step, two steps per tick: ticks end at 0.064, 0.192, …, 1.088 kimg; states 000000 (overwritten), 000001.
RUN = [*SMALL, '--batch=64', '--grid=0', '--augment=0', '--tick=0.128', '--snap=1', '--dump=1']


def train(folder, *options, kimg=1.088, seed=3):
    """Run train.py in this process, directly into `folder`."""
    seeds = [] if seed is None else [f'--seed={seed}']
    return invoke('train.py', *RUN, f'--outdir={folder}', '--nosubdir', f'--duration={kimg / 1000}', *seeds, *options)


def trained(*args, **kwargs):
    """`train`, which must succeed."""
    result = train(*args, **kwargs)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """A run of 1.088 kimg with states at 0.96 kimg (named 000000) and 1.088 kimg (000001)."""
    folder = tmp_path_factory.mktemp('whole') / 'run'
    trained(folder)
    assert [p.name for p in saved_files(folder, 'training-state')] == ['training-state-000001.pt',
                                                                      'training-state-000000.pt']
    return folder


def test_another_optimizer_and_schedule_resume_exactly(tmp_path, monkeypatch):
    """A user's own optimiser and schedule resume bit for bit, even where the rate is a NumPy number."""
    monkeypatch.setattr(training_loop, 'make_optimizer',
                        lambda net, lr, **_: torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9))
    monkeypatch.setattr(training_loop, 'learning_rate', lambda nimg, lr, _: lr * (1 + np.cos(nimg / 1000)) / 2)
    trained(tmp_path / 'whole', kimg=0.192)
    trained(tmp_path / 'cut', kimg=0.064)
    trained(tmp_path / 'cut', '--auto-resume', kimg=0.192)
    assert equal(final_state(tmp_path / 'cut'), final_state(tmp_path / 'whole'))
    monkeypatch.undo()
    refused(train(tmp_path / 'cut', '--auto-resume', kimg=0.448), 'with the optimizer SGD, not Adam')


@pytest.mark.parametrize('make', [
    lambda p: torch.optim.Adam(p, amsgrad=True), torch.optim.AdamW, torch.optim.RMSprop, torch.optim.NAdam])
def test_optimizers_whose_states_fit(make):
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer, other = make([p]), make([p])
    p.grad = torch.ones(2)
    optimizer.step()
    load_optimizer(other, optimizer.state_dict())
    assert equal(other.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize('entry', [{'momentum_buffer': torch.zeros(3)}, {'momentum_buffer': 'x'},
                                   {'momentum_buffer': None}, {'momentum_buffer': [1.]}])
def test_what_an_optimizer_keeps_is_like_its_parameter(entry):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=1, momentum=0.9)
    saved = {**optimizer.state_dict(), 'state': {0: {'momentum_buffer': torch.ones(2)}}}
    load_optimizer(optimizer, saved)
    assert torch.equal(optimizer.state[optimizer.param_groups[0]['params'][0]]['momentum_buffer'], torch.ones(2))
    with pytest.raises(MALFORMED):
        load_optimizer(optimizer, {**saved, 'state': {0: entry}})


def test_seeds_that_train_can_be_resumed(cut):
    path = saved_files(cut, 'training-state')[0]
    state = load_state(path)
    for seed in (0, np.int64(3_000_000_000), (1 << 32) - 1):
        state['settings']['seed'] = checked_seed(seed)
        save_state(path, state)
        assert load_run_state(path)['settings']['seed'] == seed
    for seed in (-1, 1 << 32, 0.5):
        with pytest.raises(UserError, match='choose one in that range'):
            checked_seed(seed)
        state['settings']['seed'] = seed
        save_state(path, state)
        with pytest.raises(UserError, match='lacks some of what'):
            load_run_state(path)


def test_two_runs_do_not_share_a_folder(tmp_path):
    """Of runs that found the same number free before any made its folder, later ones take the next or are refused."""
    for seed, folder in enumerate(('00000-a', '00001-a', '00002-a')):
        assert create_run_dir(str(tmp_path / '00000-a'), {'seed': seed}, None, 'a') == str(tmp_path / folder)
    with pytest.raises(UserError, match='another run has begun'):
        create_run_dir(tmp_path / '00000-a', {'seed': 9}, None)
    assert json.loads((tmp_path / '00000-a' / OPTIONS_NAME).read_text()) == {'seed': 0}


def test_a_run_takes_the_next_folder_if_another_was_quicker(tmp_path, monkeypatch):
    """Between looking for a free number and claiming it, another process began a run of the same name."""
    def start_late(flags, name):
        run_dir, start = start_point(flags, name)
        create_run_dir(run_dir, {'seed': 'theirs'}, None)
        return run_dir, start
    monkeypatch.setattr('train.start_point', start_late)
    out = succeed('train.py', *RUN, f'--outdir={tmp_path}', '--duration=0.000064', '--seed=3')
    theirs, ours = sorted(tmp_path.iterdir())
    assert (theirs.name[:6], ours.name[:6]) == ('00000-', '00001-') and theirs.name[6:] == ours.name[6:]
    assert [path.name for path in theirs.iterdir()] == [OPTIONS_NAME]
    assert f'Output directory:        {ours}' in out and (ours / 'log.txt').is_file()


@pytest.fixture
def cut(whole, tmp_path):
    """A copy of `whole` as if killed between the last tick's line and its state: the newest is at 0.96 kimg."""
    folder = tmp_path / 'cut'
    shutil.copytree(whole, folder)
    for kind in saving.READERS:
        saved_files(folder, kind)[0].unlink()
    (folder / '.tmp-x1y2training-state-000001.pt').write_bytes(b'half of it')
    return folder


def damage(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_auto_resume_ends_like_the_whole_run_with_each_tick_once(whole, cut):
    with open(cut / 'stats.jsonl', 'a') as f:
        f.write('{"Progress/tick": {"num": 1, "me')  # cut off by the kill
    out = trained(cut, '--auto-resume')
    assert f'Resuming from {cut}/training-state-000000.pt' in out.output
    check_same(cut, whole)


def test_the_line_of_the_last_tick_is_made_up_for(whole, cut):
    """A state may reach the disk before its tick's line in stats.jsonl does; resuming then writes that line."""
    lines = (cut / 'stats.jsonl').read_text().splitlines(keepends=True)
    tick = load_state(cut / 'training-state-000000.pt')['progress']['tick']
    (cut / 'stats.jsonl').write_text(''.join(lines[:tick - 1]))
    trained(cut, '--auto-resume')
    assert losses(cut) == losses(whole)


def test_a_finished_run_can_be_started_again_and_again(whole, cut):
    trained(cut, '--auto-resume')
    before = {p.name: p.read_bytes() for p in cut.iterdir() if p.name not in ('log.txt', 'training_options.json')}
    out = trained(cut, '--auto-resume')
    assert 'already done' in out.output
    assert before == {p.name: p.read_bytes() for p in cut.iterdir() if p.name in before}
    trained(cut, '--auto-resume', kimg=1.2)  # and can be made longer
    assert final_state(cut)['progress']['nimg'] == 1216


def test_auto_resume_starts_afresh_without_a_state(tmp_path, whole):
    trained(tmp_path / 'run', '--auto-resume')
    check_same(tmp_path / 'run', whole)


def test_auto_resume_keeps_a_seed_that_was_drawn(tmp_path):
    trained(tmp_path / 'run', '--auto-resume', kimg=0.064, seed=None)
    seed = json.loads((tmp_path / 'run' / 'training_options.json').read_text())['seed']
    trained(tmp_path / 'run', '--auto-resume', kimg=0.128, seed=None)
    assert json.loads((tmp_path / 'run' / 'training_options.json').read_text())['seed'] == seed


def test_auto_resume_finds_its_folder_by_name(tmp_path):
    def start(*options, kimg=0.064):
        out = invoke('train.py', *RUN, f'--outdir={tmp_path}', f'--duration={kimg / 1000}', '--auto-resume', *options)
        assert out.exit_code == 0, out.output
        return out.output
    start('--desc=a')
    start('--desc=b')
    start('--desc=a', kimg=0.128)
    folders = sorted(p.name for p in tmp_path.iterdir())
    assert len(folders) == 2 and folders[0].startswith('00000-') and folders[0].endswith('-a')
    assert load_state(tmp_path / folders[0] / 'training-state-000000.pt')['progress']['nimg'] == 128
    (tmp_path / folders[0]).rename(tmp_path / folders[0].replace('-gpus1-', '-gpus8-'))
    assert 'already done' in start('--desc=a', kimg=0.128)  # a run may continue with another number of ranks


@pytest.mark.parametrize('where', ['file', 'folder', 'latest'])
def test_resume_takes_a_file_a_folder_or_latest(where, whole, cut):
    (cut.parent / 'other').mkdir()
    value = {'file': cut / 'training-state-000000.pt', 'folder': cut, 'latest': 'latest'}[where]
    (cut / 'training-state-000000.pt').touch()
    out = invoke('train.py', *RUN, f'--outdir={cut.parent}', '--duration=0.001088', '--seed=3', f'--resume={value}')
    assert out.exit_code == 0, out.output
    assert f'Resuming from {cut}/training-state-000000.pt' in out.output
    new = next(cut.parent.glob('00000-*'))
    assert equal(final_state(new), final_state(whole)) and losses(new) == losses(whole)[-1:]


def test_resume_of_a_finished_state_leaves_no_folder(whole, tmp_path):
    refused(invoke('train.py', *RUN, f'--outdir={tmp_path}/new', '--duration=0.000512', f'--resume={whole}'),
            'thousand images, all that --duration=0.000512 (in millions) asks for; give a longer --duration')
    assert not (tmp_path / 'new').exists()


def test_a_damaged_state_is_passed_over(whole, tmp_path):
    folder = tmp_path / 'run'
    shutil.copytree(whole, folder)
    damage(folder / 'training-state-000001.pt')
    out = trained(folder, '--auto-resume')
    assert 'skipping a damaged state' in out.output and 'training-state-000001.pt is damaged' in out.output
    check_same(folder, whole)


def test_without_any_good_state(whole, cut):
    damage(cut / 'training-state-000000.pt')
    new = cut.parent / 'new'
    refused(train(new, f'--resume={cut / "training-state-000000.pt"}'), 'damaged')
    refused(train(new, f'--resume={cut}'), 'damaged')
    shutil.copy(cut / 'training-state-000000.pt', cut / 'training-state-000001.pt')
    refused(train(new, f'--resume={cut}'), 'none of the 2 training states')
    assert not new.exists()
    # Starting over would overwrite snapshots and records, perhaps only because a disk was briefly missing.
    before = content(cut)
    refused(train(cut, '--auto-resume'), 'none of the training states', 'delete them')
    assert content(cut) == before
    for state in cut.glob('training-state-*.pt'):
        state.unlink()
    assert 'Resuming' not in trained(cut, '--auto-resume').output
    check_same(cut, whole)


@pytest.mark.parametrize('value, sentence', [('/nowhere/training-state-000001.pt', '/nowhere'), ('latest', 'latest'),
                                             ('{tmp}', 'no training-state-*.pt')])
def test_nothing_to_resume(value, sentence, tmp_path):
    resume = f'--resume={value.format(tmp=tmp_path)}'
    refused(invoke('train.py', *RUN, f'--outdir={tmp_path / "runs"}', resume), sentence)
    assert not (tmp_path / 'runs').exists()


def content(folder):
    """{name: bytes} of a folder's files."""
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize('option, sentences', [
    ('--cbase=16', ['--cbase was 8 there and is 16 here', '--desc=… or another --outdir']),
    ('--precond=stf', ['--precond=edm, not stf'])])
def test_another_network_or_system_is_refused_before_anything_is_written(option, sentences, cut):
    """The options that the message refers to are still that run's, and records past the state are kept too."""
    before = content(cut)
    refused(train(cut, '--auto-resume', option), *sentences)
    assert content(cut) == before
    assert json.loads((cut / 'training_options.json').read_text())['network_kwargs']['model_channels'] == 8


@pytest.mark.parametrize('first, second', [
    ([], ['--bnr=0.5']), (['--bnr=0.50'], ['--bnr-schedule=constant']), (['--bnr=0.1,1'], ['--bnr=.1,1.0']),
    (['--bnr-schedule=blurring'], ['--bnr-schedule=blurring:20'])])
def test_another_spelling_of_the_same_option_resumes(first, second, tmp_path):
    """An explicit default resumes too; the same BNRs in another order do not, as they are drawn differently."""
    trained(tmp_path, '--precond=warm', *first, kimg=0.064)
    assert 'Resuming' in trained(tmp_path, '--precond=warm', '--auto-resume', *second, kimg=0.128).output
    refused(train(tmp_path, '--precond=warm', '--auto-resume', '--bnr=1,.1'), '--bnr was', 'there and is 1,0.1 here')


@pytest.mark.parametrize('option, sentence', [
    ('--bnr=1', '--bnr was 0.5 there and is 1 here'), ('--bnr-schedule=blurring', '--bnr was 0.5 there and is not set'),
    ('--bnr-schedule=blurring', '--bnr-schedule was not set there and is blurring:20 here'),
    ('--cres=1,2', '--cres was 1,1 there and is 1,2 here'),
    ('--arch=ncsnpp', '--arch (embedding_type) was positional there and is fourier here'),
    ('--cond=1', 'the number of classes (--cond) was 0 there and is 10 here'),
    ('--targets=clean', '--targets was residual there and is clean here')])
def test_another_network_is_named_by_its_options(option, sentence, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / 'warm-run'
    if not folder.exists():
        trained(folder, '--precond=warm', kimg=0.064)
    refused(train(folder, '--precond=warm', f'--resume={folder}', option, '--auto-resume'), sentence,
            "resume with that run's options")


def test_a_run_goes_on_in_another_precision_and_with_another_dropout(cut, tmp_path):
    """The tensors mean the same, so both may change, as after fp16 has diverged; the change is printed."""
    result = trained(tmp_path, f'--resume={cut}', '--fp16=1', '--dropout=0.1', kimg=1.024)
    assert '--fp16 was 0 there and is 1 here.' in result.output and '--dropout was 0.13 there' in result.output
    back = trained(tmp_path / 'back', f'--resume={tmp_path}', kimg=1.152)
    assert '--fp16 was 1 there and is 0 here.' in back.output
    options = read_snapshot(saved_files(tmp_path / 'back', 'network-snapshot')[0]).network_kwargs
    assert options['use_fp16'] is False and options['dropout'] == 0.13


def test_other_augmentations_are_refused(tmp_path):
    """They may have as many label columns, but with other meanings. The probability and the order are free."""
    def resume(*options):
        return train(tmp_path, '--auto-resume', *options, kimg=0.128)
    trained(tmp_path, '--augment=0.1', '--augment-with=xflip,scale', kimg=0.064)
    refused(resume('--augment=0.1', '--augment-with=yflip,scale'), '--augment-with=xflip,scale, not yflip,scale')
    refused(resume('--augment=0'), '--augment-with=xflip,scale, not none')
    assert 'Resuming' in resume('--augment=0.2', '--augment-with=scale,xflip').output


def test_nosubdir_does_not_train_over_a_run(cut):
    """A folder that holds a run is refused, with --resume too; a dry run still shows the options."""
    before = content(cut)
    refused(train(cut), f'{cut} already holds a run', '--outdir', '--auto-resume')
    refused(train(cut, f'--resume={cut}'), f'{cut} already holds a run')
    assert train(cut, '--dry-run').exit_code == 0
    assert content(cut) == before


def test_a_run_that_is_done_is_not_another_systems(whole, tmp_path):
    """Command and loop check a state's origin before its length, so a finished run of another system is refused."""
    refused(train(tmp_path / 'new', f'--resume={whole}', '--precond=stf', kimg=0.064), '--precond=edm, not stf')
    refused(train(tmp_path / 'new', f'--resume={whole}', '--cbase=16', kimg=0.064), '--cbase was 8')
    assert not (tmp_path / 'new').exists()
    options = json.loads((whole / 'training_options.json').read_text())
    options.update(system='stf', resume=str(saved_files(whole, 'training-state')[0]))
    with pytest.raises(UserError, match='--precond=edm, not stf'):
        training_loop.training_loop(run_dir=str(tmp_path), systems=SYSTEMS, **options)


def drop(*keys):
    """A change of a state: the entry at `keys` is removed."""
    def change(state):
        for key in keys[:-1]:
            state = state[key]
        del state[keys[-1]]
    return change


def put(value, *keys):
    """A change of a state: the entry at `keys` becomes `value`."""
    def change(state):
        for key in keys[:-1]:
            state = state[key]
        state[keys[-1]] = value
    return change


@pytest.mark.parametrize('change', [
    *(drop(name) for name in ('net', 'ema', 'optimizer', 'network_kwargs', 'ranks', 'progress', 'settings',
                              'last_tick')),
    put(-64, 'progress', 'nimg'), put('0', 'progress', 'tick'), put(float('inf'), 'progress', 'seconds'),
    drop('settings', 'ema_rampup_ratio'), put('7', 'settings', 'seed'), put('[' * 100_000, 'last_tick'),
    put([], 'ranks'), put(torch.zeros(3), 'ranks', 0, 'random'), put(torch.zeros(4), 'ranks', 0, 'statistics', 'x'),
    put(torch.zeros(9, dtype=torch.uint8), 'ranks', 0, 'random', 'cpu'), put(torch.zeros(2, 2), 'network_kwargs'),
    put({}, 'net'), put(5, 'ema'), put([], 'optimizer', 'param_groups'), put({'step': 1}, 'optimizer', 'state', 0),
    put(torch.zeros(1), 'optimizer', 'state', 0, 'exp_avg'), put({}, 'ema_difference'),
    put(torch.zeros(3, 5, dtype=torch.bfloat16), 'network_kwargs', 'img_resolution')])
def test_a_state_that_is_not_one_of_a_run_is_refused(change, cut, tmp_path):
    """The file and its checksum are sound, but it was made by hand or by another version of this program."""
    path = tmp_path / 'training-state-000000.pt'
    state = load_state(cut / path.name)
    change(state)
    save_state(path, state)
    refused(train(tmp_path / 'new', f'--resume={path}'), str(path), 'resume')


# -- what is on the disk

def test_a_file_reaches_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """The file is flushed, renamed, and its folder flushed, so a power loss never leaves half a file under the name."""
    events = []
    for name in ('fsync', 'replace'):
        def noted(*args, do=getattr(os, name), name=name):
            what = stat.S_ISDIR(os.fstat(args[0]).st_mode) if name == 'fsync' else os.path.basename(args[1])
            events.append((name, what))
            return do(*args)
        monkeypatch.setattr(os, name, noted)
    save_state(tmp_path / 'training-state-000001.pt', {'w': torch.zeros(3)})
    assert events == [('fsync', False), ('replace', 'training-state-000001.pt'), ('fsync', True)]


def test_a_wrong_checksum_inside_is_noticed(tmp_path):
    """Even if the archive around it is sound, as when a bit flips in memory before it is written."""
    path = tmp_path / 'training-state-000001.pt'
    save_state(path, {'w': torch.zeros(4)})
    content = torch.load(path, weights_only=True)
    content['state']['w'][2] = 1
    torch.save(content, path)
    with pytest.raises(UserError, match='checksum of its content'):
        load_state(path)


def fake_files(folder, kimgs):
    for kimg in kimgs:
        save_state(folder / f'training-state-{kimg:06d}.pt', {'w': torch.full([1000], float(kimg))})


def test_prune_keeps_the_newest(tmp_path):
    fake_files(tmp_path, [1, 2, 3, 4, 9])
    prune(tmp_path, 2, 4500)  # 9 is from a run that was then continued from further back
    names = [p.name for p in saved_files(tmp_path, 'training-state')]
    assert names == [f'training-state-{k:06d}.pt' for k in (9, 4, 3)]


def test_prune_never_deletes_the_only_good_one(tmp_path, capsys):
    fake_files(tmp_path, [1, 2, 3])
    damage(tmp_path / 'training-state-000003.pt')
    prune(tmp_path, 1, 3000)
    assert len(saved_files(tmp_path, 'training-state')) == 3
    assert 'No older files are deleted' in capsys.readouterr().out


def test_keep(tmp_path):
    trained(tmp_path, '--keep=2', '--tick=0.5', kimg=2.2)
    assert [p.name for p in saved_files(tmp_path, 'training-state')] == ['training-state-000002.pt',
                                                                        'training-state-000001.pt']
    assert len(saved_files(tmp_path, 'network-snapshot')) == 2


def test_a_full_disk_ends_the_run_with_a_sentence_and_the_last_state(cut):
    state = cut / 'training-state-000000.pt'
    before = state.read_bytes()
    with full_disk(len(before) // 2):  # a snapshot fits, a state does not
        refused(train(cut, '--auto-resume', kimg=50), 'could not write', 'training-state', 'free some space')
    assert state.read_bytes() == before and not list(cut.glob('.tmp-*'))
    trained(cut, '--auto-resume')


def test_a_lost_mount_ends_the_run_with_a_sentence(cut, monkeypatch):
    """If the folder disappears in the middle of the run, its last state stays good, and the run continues from it."""
    end_step, away = Health.end_step, cut.parent / 'away'

    def unmount(self, step, *args):
        if step == 16:
            cut.rename(away)
        end_step(self, step, *args)
    monkeypatch.setattr(Health, 'end_step', unmount)
    refused(train(cut, '--auto-resume'), 'could not write', str(cut))
    monkeypatch.undo()
    assert saved_files(away, 'training-state')
    trained(away, '--auto-resume')


def test_saving_waits_for_the_copy_only(tmp_path, monkeypatch):
    """`save` returns once the data are copied; what is written is what was there when it was called."""
    changed = threading.Event()

    def late(path, state):
        assert changed.wait(60), '`save` waits until the file is written'
        save_state(path, state)
    monkeypatch.setattr(saving, 'save_state', late)
    weights = torch.zeros(5)
    with Saver(tmp_path) as saver:
        saver.save(7000, state={'w': weights})
        weights += 1
        changed.set()
        saver.finish()
        assert saved_files(tmp_path, 'training-state')
    assert torch.equal(load_state(tmp_path / 'training-state-000007.pt')['w'], torch.zeros(5))


def test_an_error_of_the_writer_comes_up_later(tmp_path, monkeypatch):
    def fail(path, state):
        raise UserError('the disk is gone')
    monkeypatch.setattr(saving, 'save_state', fail)
    with Saver(tmp_path) as saver:
        saver.save(1000, state={})
        with pytest.raises(UserError, match='the disk is gone'):
            saver.finish()
        with pytest.raises(UserError, match='the disk is gone'):
            saver.check()


def test_host_copy_shares_what_is_shared():
    w = torch.arange(6.).reshape(2, 3).t()
    copy = host_copy({'a': w, 'b': [w, (1, 'x')]})
    assert copy['a'] is copy['b'][0] and copy['b'][1] == (1, 'x') and torch.equal(copy['a'], w)
    w[0, 0] = 9
    assert copy['a'][0, 0] == 0 and copy['a'].is_contiguous()


def test_a_state_of_another_system_is_refused_and_other_data_is_said(whole, tmp_path):
    """STF's network has EDM's tensors, so only the state can tell; data under another name are pointed out."""
    stf = train(tmp_path / 'a', f'--resume={whole}', '--precond=stf', kimg=1.2)
    refused(stf, '--precond=edm, not stf', '--transfer')
    data = tmp_path / 'other.zip'
    shutil.copy(EMBEDDED, data)
    result = trained(tmp_path / 'b', f'--resume={whole}', f'--data={data}', kimg=1.2)
    assert 'was trained on digits-8x8 (1797 images) and continues with other (1797 images)' in result.output
    assert 'with other options' not in result.output


def test_a_run_that_goes_on_with_other_options_says_so(whole, tmp_path):
    """What it learns changes; how often it saves, or where the data lie, is nobody's concern."""
    result = trained(tmp_path / 'a', f'--resume={whole}', '--lr=0.5', '--xflip=1', '--snap=2', kimg=1.2, seed=4)
    line, = (line for line in result.output.splitlines() if 'with other options' in line)
    assert line == ('Warning: this run continues with other options: dataset_kwargs.xflip True (was False), '
                    'optimizer_kwargs.lr 0.5 (was 0.001), seed 4 (was 3).')
    assert line in (tmp_path / 'a' / 'log.txt').read_text()


def test_more_images_under_the_same_name_are_said(capsys):
    data = types.SimpleNamespace(name='cats', num_files=20)
    warn_if_dataset_changed(dict(dataset='cats', num_images=10), data)
    assert capsys.readouterr().out == ('Warning: this run was trained on cats (10 images) and continues with cats '
                                       '(20 images).\n')
    for settings in ({}, dict(dataset='cats'), dict(dataset='cats', num_images=20)):
        warn_if_dataset_changed(settings, data)
        assert capsys.readouterr().out == '', 'older runs do not say how many'


def test_files_that_replace_each_other_are_announced(tmp_path):
    said = [trained(tmp_path / name, '--tick=0.5', f'--snap={snap}', f'--dump={dump}', kimg=0.064).output
            for name, snap, dump in (('a', 1, 4), ('b', 2, 4), ('c', 0, 0))]
    assert ['replace each other' in output for output in said] == [True, False, False]


def test_nothing_is_written_after_an_error(tmp_path, monkeypatch):
    """The first error is the one that is said, and no later save deletes what is kept."""
    def fail(path, state):
        raise UserError(f'{path} cannot be written')
    monkeypatch.setattr(saving, 'save_state', fail)
    with Saver(tmp_path) as saver:
        saver.save(1000, state={})
        saver.save(2000, state={})
        with pytest.raises(UserError, match='000001.pt'):
            saver.finish()


# -- where a run starts

def test_a_state_of_its_own_goes_before_resume(whole, cut):
    """The same command, started again, goes on from where it was, not from the other run again."""
    flags = dict(outdir=cut, nosubdir=True, auto_resume=True, resume=whole, dry_run=False)
    assert start_point(flags, 'name')[1].path == str(cut / 'training-state-000000.pt')


def test_resume_goes_on_where_no_state_of_its_own_can_be_read(whole, cut):
    damage(cut / 'training-state-000000.pt')
    flags = dict(outdir=cut, nosubdir=True, auto_resume=True, resume=whole, dry_run=False)
    assert start_point(flags, 'name')[1].path == str(whole / 'training-state-000001.pt')


@pytest.mark.parametrize('last', ['00000-a', '00001-b', '.'])
def test_the_latest_run_is_the_one_that_saved_last(last, tmp_path):
    """It need not have the highest number, and may be in --outdir itself (--nosubdir)."""
    for folder in ('00000-a', '00001-b', '.'):
        (tmp_path / folder).mkdir(exist_ok=True)
        path = tmp_path / folder / 'training-state-000001.pt'
        path.touch()
        os.utime(path, (2000, 2000) if folder == last else (1000, 1000))
    assert find_states('latest', tmp_path) == [tmp_path / last / 'training-state-000001.pt']


def test_a_transferred_run_resumes(whole, tmp_path):
    """Its average of the weights has no ramp-up, then as before."""
    snapshot = saved_files(whole, 'network-snapshot')[0]
    trained(tmp_path, f'--transfer={snapshot}', kimg=0.064)
    trained(tmp_path, '--auto-resume', kimg=0.128)
    assert final_state(tmp_path)['settings']['ema_rampup_ratio'] is None


def test_a_folder_that_cannot_be_claimed():
    with pytest.raises(UserError, match=f'could not write in {READ_ONLY}: .*; choose another --outdir'):
        create_run_dir(READ_ONLY, {}, None)


def test_a_link_to_nowhere_is_no_place_for_a_run(tmp_path):
    (tmp_path / 'link').symlink_to(tmp_path / 'gone')
    with pytest.raises(UserError, match='could not create the folder'):
        check_run_dir(tmp_path / 'link' / 'runs')


# -- what a run takes from a state

def test_runs_that_do_not_name_their_optimizer_are_adams():
    check_origin({}, 'x.pt', optimizer='Adam')
    with pytest.raises(UserError, match='with the optimizer Adam, not SGD'):
        check_origin({}, 'x.pt', optimizer='SGD')


@pytest.fixture
def ranks(monkeypatch):
    """ranks(rank, count) makes this process one of so many."""
    def change(rank, count):
        monkeypatch.setattr(dist, 'get_rank', lambda: rank)
        monkeypatch.setattr(dist, 'get_world_size', lambda: count)
    return change


def test_noise_differs_between_ranks_and_between_starts(ranks):
    """Else ranks would learn from the same noise, and a run that goes on with other ranks from its former noise."""
    def noise(rank, nimg):
        ranks(rank, 2)
        seed_rank(5, {'progress': {'nimg': nimg}, 'ranks': [None] * 3})
        return torch.randn([]).item()
    draws = [noise(rank, nimg) for rank in (0, 1) for nimg in (0, 64)]
    assert len(set(draws)) == 4 and noise(1, 64) == draws[3]


@pytest.mark.parametrize('count', [1, 4])
def test_noise_of_other_numbers_of_ranks_is_not_continued(count, ranks, capsys):
    torch.manual_seed(1)
    own = dict(random=random_state(), statistics={'x': torch.zeros(3, dtype=torch.float64)})
    ranks(0, 2)
    seed_rank(5, {'progress': {'nimg': 64}, 'ranks': [own] * count})
    assert f'saved by {count} ranks and continues with 2' in capsys.readouterr().out
    assert not torch.equal(torch.get_rng_state(), own['random']['cpu']) and training_stats.unread() == {}


def test_a_new_run_has_no_statistics_of_another():
    training_stats.report('x', 1)  # by a run in this process that ended within a tick
    seed_rank(5)
    assert training_stats.unread() == {}


# -- the thread that writes

def test_few_saves_wait_for_the_disk(tmp_path, monkeypatch):
    """Beyond MAX_WAITING the run waits too: a disk that is too slow must not fill the memory."""
    disk, saved = threading.Event(), []
    monkeypatch.setattr(saving, 'save_state', lambda path, state: disk.wait(10))
    with Saver(tmp_path) as saver:
        def run():
            for i in range(MAX_WAITING + 2):
                saver.save(i, state={})
                saved.append(i)
        thread = threading.Thread(target=run)
        thread.start()
        thread.join(0.2)
        before = len(saved)
        disk.set()
        thread.join()
    assert before <= MAX_WAITING + 1 and len(saved) == MAX_WAITING + 2


def test_an_error_elsewhere_loses_nothing_that_was_saved(tmp_path, monkeypatch):
    def slow(path, state):
        time.sleep(0.2)
        save_state(path, state)
    monkeypatch.setattr(saving, 'save_state', slow)
    with pytest.raises(KeyError), Saver(tmp_path) as saver:
        saver.save(1000, state={'w': torch.zeros(2)})
        raise KeyError
    assert load_state(tmp_path / 'training-state-000001.pt')


@pytest.mark.parametrize('keep, left', [(0, [3, 2, 1]), (1, [3]), (2, [3, 2])])
def test_as_many_states_stay_as_are_to_be_kept(keep, left, tmp_path):
    """One, too; 0 keeps all."""
    with Saver(tmp_path, keep) as saver:
        for kimg in (1, 2, 3):
            saver.save(1000 * kimg, state={'w': torch.zeros(2)})
        saver.finish()
    assert [p.name for p in saved_files(tmp_path, 'training-state')] == [f'training-state-{k:06d}.pt' for k in left]


def test_a_damaged_state_keeps_no_old_snapshots(tmp_path, monkeypatch):
    """Each kind of file is judged by its own newest."""
    fake_files(tmp_path, [1, 2])
    damage(tmp_path / 'training-state-000002.pt')
    for kimg in (1, 2):
        (tmp_path / f'network-snapshot-{kimg:06d}.safetensors').touch()
    monkeypatch.setitem(saving.READERS, 'network-snapshot', lambda path: None)
    prune(tmp_path, 1, 2000)
    assert len(saved_files(tmp_path, 'training-state')) == 2 and len(saved_files(tmp_path, 'network-snapshot')) == 1


def test_an_old_file_that_cannot_be_deleted_stays(tmp_path, monkeypatch):
    """The others go, and the run goes on."""
    fake_files(tmp_path, [1, 2, 3, 4])
    unlink = pathlib.Path.unlink

    def busy(path):
        if path.name == 'training-state-000002.pt':
            raise OSError(16, 'Device or resource busy')
        unlink(path)
    monkeypatch.setattr(pathlib.Path, 'unlink', busy)
    prune(tmp_path, 1, 4000)
    names = [p.name for p in saved_files(tmp_path, 'training-state')]
    assert names == ['training-state-000004.pt', 'training-state-000002.pt']
