"""The folder of a training run: its name and number, where a run starts or continues, and that no two share one."""

import json
import os
import re
import tempfile

from dnnlib import UserError
from dnnlib.files import atomic_write, make_dirs, remove_temporary_files
from torch_utils import distributed as dist
from training.dataset import name_of
from training.progress import load_run_state
from training.run_files import OPTIONS_NAME, STATE, saved_files
from training.saving import find_states, newest_good
from training.status import trim_records


def run_name(config, arch, desc=None):
    """DATASET-COND-ARCH-PRECOND-gpusG-batchB-DTYPE[-DESC], as EDM names its run folders."""
    parts = [
        name_of(config['dataset_kwargs']['path']),
        'cond' if config['dataset_kwargs']['use_labels'] else 'uncond',
        arch,
        config['system'],
        f'gpus{dist.get_world_size()}',
        f"batch{config['batch_size']}",
        config['accelerate_kwargs']['precision'],
    ]
    return '-'.join(parts + ([desc] if desc else []))


def next_run_dir(outdir, name):
    """OUTDIR/NNNNN-NAME with NNNNN one above the highest there; not created."""
    numbers = [int(m[0]) for entry in (os.listdir(outdir) if os.path.isdir(outdir) else [])
               if (m := re.match(r'\d{5,}(?=-|$)', entry))]
    return os.path.join(outdir, f'{max(numbers, default=-1) + 1:05d}-{name}')


def start_point(flags, name):
    """(run folder, what to continue). Only looks; nothing is created.

    --auto-resume takes the run folder with the highest number and this run's name, whatever its number of ranks,
    and the newest good state in it; without any, --resume's state.

    Returns:
        The folder; {'path', 'settings', 'network_kwargs', 'tick', 'last_tick', 'complaints'} of a state
        (training.progress.run_state). 'path' None: a new run.

    Raises:
        UserError: --nosubdir without --auto-resume, and a run is there already; there is no state where --resume says,
            or none that can be read.
    """
    if flags['nosubdir'] and not flags['auto_resume'] and not flags['dry_run']:
        if os.path.exists(os.path.join(flags['outdir'], OPTIONS_NAME)):
            raise UserError(f"{flags['outdir']} already holds a run, which --nosubdir would overwrite; choose another "
                            '--outdir, or continue that run with --auto-resume')
    run_dir = flags['outdir'] if flags['nosubdir'] else next_run_dir(flags['outdir'], name)
    path, state, complaints = None, None, []
    if flags['auto_resume']:
        run_dir = run_dir if flags['nosubdir'] else same_run_dir(flags['outdir'], name) or run_dir
        path, state, complaints = newest_good(saved_files(run_dir, STATE))
        if path is None and complaints and not flags['resume']:  # starting over would write over what is there
            raise UserError(f'none of the training states in {run_dir} can be read ({complaints[0]}); if they are '
                            'lost, delete them to start over there, or start elsewhere with another --outdir or --desc')
    if path is None and flags['resume']:
        states = find_states(flags['resume'], flags['outdir'])
        if len(states) == 1:
            load_run_state(states[0])  # says what is wrong with it
        path, state, complaints = newest_good(states)
        if path is None:
            raise UserError(f'none of the {len(states)} training states in {states[0].parent} can be read '
                            f'({complaints[0]}); resume from another run')
    if path is None:
        state = dict(settings={}, network_kwargs={}, progress={'tick': 0}, last_tick='{}')
    return run_dir, dict(path=path and str(path), settings=state['settings'], network_kwargs=state['network_kwargs'],
                         tick=state['progress']['tick'], last_tick=state['last_tick'], complaints=complaints)


def same_run_dir(outdir, name):
    """The folder OUTDIR/NNNNN-NAME with the highest number, None without one; the number of ranks in it may differ."""
    def but_ranks(text):
        return re.sub(r'-gpus\d+-', '-gpus*-', text)
    found = [entry for entry in (os.listdir(outdir) if os.path.isdir(outdir) else [])
             if (m := re.fullmatch(r'\d{5,}-(.*)', entry)) and but_ranks(m[1]) == but_ranks(name)]
    return os.path.join(outdir, max(found, key=lambda entry: int(entry.split('-')[0]))) if found else None


def check_run_dir(run_dir):
    """Raise UserError where `create_run_dir` could not make the folder; nothing stays of the attempt."""
    folder = os.path.abspath(run_dir)
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    try:
        os.rmdir(tempfile.mkdtemp(dir=folder))
    except OSError as e:
        raise UserError(f'could not create the folder {run_dir}: {e.strerror or e}; choose another --outdir') from e


def create_run_dir(run_dir, config, start, name=None):
    """Make the run folder with its training_options.json. On rank 0.

    Args:
        start: From `start_point`. What the folder's records say about later ticks is dropped with --auto-resume;
            None otherwise.
        name: Of the run, if its folder may be of a higher number, where another run has begun in this one meanwhile.

    Returns:
        The folder.

    Raises:
        UserError: another run has begun there meanwhile; a file or the folder cannot be written.
    """
    if start is None:
        while not _claim(run_dir):
            if name is None:
                raise UserError(f'another run has begun in {run_dir} meanwhile; run the command again')
            run_dir = next_run_dir(os.path.dirname(run_dir), name)
    else:
        make_dirs(run_dir)
        trim_records(run_dir, start['tick'], json.loads(start['last_tick']))
        remove_temporary_files(run_dir)
    with atomic_write(os.path.join(run_dir, OPTIONS_NAME), 'w') as f:
        json.dump(config, f, indent=2)
    return run_dir


def _claim(run_dir):
    """Make the folder this process's own: of several runs that begin at once, one gets it. Returns whether it did."""
    make_dirs(run_dir)
    try:
        open(os.path.join(run_dir, OPTIONS_NAME), 'x').close()
    except FileExistsError:
        return False
    except OSError as e:
        raise UserError(f'could not write in {run_dir}: {e.strerror or e}; choose another --outdir') from e
    return True
