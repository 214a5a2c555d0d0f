"""The folder of a training run: its name and number, what to resume from, and that no two runs share one."""

import dataclasses
import json
import os
import re
import tempfile

from dnnlib import UserError
from dnnlib.files import atomic_write, make_dirs, remove_temporary_files
from dnnlib.json_files import read_object
from dnnlib.text import excerpt
from torch_utils import distributed as dist
from training.dataset import name_of
from training.run_files import OPTIONS_NAME, STATE, saved_files
from training.saving import find_states, newest_good
from training.status import trim_records


# Options of a run that change what it learns, and that are not already checked elsewhere (training.progress).
LEARNING = ('seed', 'batch_size', 'optimizer_kwargs', 'ema_halflife_kimg', 'lr_rampup_kimg', 'augment_kwargs',
            'dataset_kwargs.use_labels', 'dataset_kwargs.xflip', 'accelerate_kwargs.precision')


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
    """OUTDIR/NNNNN-NAME, NNNNN one above the highest number there; does not create it."""
    numbers = [int(m[0]) for entry in (os.listdir(outdir) if os.path.isdir(outdir) else [])
               if (m := re.match(r'\d{5,}(?=-|$)', entry))]
    return os.path.join(outdir, f'{max(numbers, default=-1) + 1:05d}-{name}')


@dataclasses.dataclass(frozen=True)
class StartPoint:
    """Where a run starts: at a training state, or, with the defaults, at none.

    Attributes:
        path: The state's file; None for a new run.
        settings, network_kwargs, last_tick: As in the state (training.progress.run_state); `last_tick` is JSON text.
        nimg, tick: Images seen and ticks completed there.
        complaints: What is wrong with newer states, which were skipped: a sentence each.
    """

    path: str | None = None
    settings: dict = dataclasses.field(default_factory=dict)
    network_kwargs: dict = dataclasses.field(default_factory=dict)
    nimg: int = 0
    tick: int = 0
    last_tick: str = '{}'
    complaints: list = dataclasses.field(default_factory=list)


def start_point(flags, name):
    """(run folder, `StartPoint`), without creating anything.

    --auto-resume takes the newest good state in the run folder with the highest number and this run's name (the number
    of ranks may differ); if there is none, or without --auto-resume, it is --resume's state.

    Raises:
        UserError: --nosubdir without --auto-resume where a run already exists; no state where --resume points, or no
            readable one; states for --auto-resume that cannot be read, without a --resume to fall back on.
    """
    run_dir = _folder(flags, name)
    start = None
    if flags['auto_resume']:
        start = _own_start(run_dir, flags['resume'])
    if start is None and flags['resume']:
        start = _resumed_start(flags['resume'], flags['outdir'])
    return run_dir, start or StartPoint()


def _folder(flags, name):
    """The run's folder: --outdir itself with --nosubdir, that of an earlier run with --auto-resume, or a new one."""
    outdir = flags['outdir']
    if flags['nosubdir']:
        replaces = not flags['auto_resume'] and not flags['dry_run']
        if replaces and os.path.exists(os.path.join(outdir, OPTIONS_NAME)):
            raise UserError(f'{outdir} already holds a run, which --nosubdir would overwrite; choose another '
                            '--outdir, or continue that run with --auto-resume')
        return outdir
    earlier = same_run_dir(outdir, name) if flags['auto_resume'] else None
    return earlier or next_run_dir(outdir, name)


def _own_start(run_dir, resume):
    """The newest good state in the run's own folder, or None; with --resume (`resume`) they may be unreadable."""
    start, complaints = _newest_start(saved_files(run_dir, STATE))
    if start is None and complaints and not resume:  # starting over would overwrite what is there
        raise UserError(f'none of the training states in {run_dir} can be read ({complaints[0]}); if they are '
                        'lost, delete them to start over there, or start elsewhere with another --outdir or --desc')
    return start


def _resumed_start(resume, outdir):
    """The newest good state of those that --resume can mean."""
    states = find_states(resume, outdir)
    start, complaints = _newest_start(states)
    if start is None and len(states) == 1:
        raise UserError(complaints[0])
    if start is None:
        raise UserError(f'none of the {len(states)} training states in {states[0].parent} can be read '
                        f'({complaints[0]}); resume from another run')
    return start


def _newest_start(states):
    """(StartPoint of the newest state that can be read, or None; what is wrong with those before it)."""
    path, state, complaints = newest_good(states)
    if path is None:
        return None, complaints
    progress = state['progress']
    start = StartPoint(path=str(path), settings=state['settings'], network_kwargs=state['network_kwargs'],
                       nimg=progress['nimg'], tick=progress['tick'], last_tick=state['last_tick'],
                       complaints=complaints)
    return start, complaints


def changed_options(path, config):
    """What a resumed run learns differently than before: ['optimizer_kwargs.lr 0.01 (was 0.001)', …].

    Args:
        path: The state; the options of its run lie beside it, as far as they are still there.
        config: The options of the resumed run.
    """
    before = _leaves(read_object(os.path.join(os.path.dirname(path), OPTIONS_NAME)) or {} if path else {})
    now = _leaves(config)
    return [f'{name} {excerpt(now.get(name))} (was {excerpt(value)})' for name, value in before.items()
            if name.startswith(LEARNING) and value is not None and value != now.get(name)]


def _leaves(options, prefix=''):
    """{'optimizer_kwargs.lr': 0.001, …} of nested options."""
    found = {}
    for name, value in options.items():
        found.update(_leaves(value, f'{prefix}{name}.') if isinstance(value, dict) else {prefix + name: value})
    return found


def same_run_dir(outdir, name):
    """The folder OUTDIR/NNNNN-NAME with the highest number, or None; its number of ranks may differ from NAME's."""
    def but_ranks(text):
        return re.sub(r'-gpus\d+-', '-gpus*-', text)
    found = [entry for entry in (os.listdir(outdir) if os.path.isdir(outdir) else [])
             if (m := re.fullmatch(r'\d{5,}-(.*)', entry)) and but_ranks(m[1]) == but_ranks(name)]
    return os.path.join(outdir, max(found, key=lambda entry: int(entry.split('-')[0]))) if found else None


def check_run_dir(run_dir):
    """Raise UserError if `create_run_dir` could not create the folder; leaves nothing behind."""
    folder = os.path.abspath(run_dir)
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    try:
        os.rmdir(tempfile.mkdtemp(dir=folder))
    except OSError as e:
        raise UserError(f'could not create the folder {run_dir}: {e.strerror or e}; choose another --outdir') from e


def create_run_dir(run_dir, config, start, name=None):
    """Create the run folder with its training_options.json. On rank 0.

    Args:
        start: The `StartPoint` with --auto-resume: the folder is reused, and later ticks are dropped from its
            records. None otherwise: the folder must not hold a run yet.
        name: Name of the run, if it may move on to the next number when another run has just taken this folder.

    Returns:
        The folder.

    Raises:
        UserError: another run has just taken the folder (without `name`); a file or the folder cannot be written.
    """
    if start is None:
        while not _claim(run_dir):
            if name is None:
                raise UserError(f'another run has begun in {run_dir} meanwhile; run the command again')
            run_dir = next_run_dir(os.path.dirname(run_dir), name)
    else:
        make_dirs(run_dir)
        trim_records(run_dir, start.tick, json.loads(start.last_tick))
        remove_temporary_files(run_dir)
    with atomic_write(os.path.join(run_dir, OPTIONS_NAME), 'w') as f:
        json.dump(config, f, indent=2)
    return run_dir


def _claim(run_dir):
    """Claim the folder for this run; returns False if another run has it. Of several starting at once, one gets it."""
    make_dirs(run_dir)
    try:
        open(os.path.join(run_dir, OPTIONS_NAME), 'x').close()
    except FileExistsError:
        return False
    except OSError as e:
        raise UserError(f'could not write in {run_dir}: {e.strerror or e}; choose another --outdir') from e
    return True
