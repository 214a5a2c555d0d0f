"""How far a training run has come, and what it takes to continue from there bit for bit."""

import contextlib
import dataclasses
import json
import numbers

import numpy as np
import torch

from dnnlib import UserError
from dnnlib.text import excerpt
from torch_utils import distributed as dist
from torch_utils import training_stats
from training.compact import MOMENTS, expand, is_compact
from training.state import load_state
from training.system import as_flags, flag_of
from training.unet import ARCHITECTURES, MODELS

# What Python and PyTorch raise for values of an unexpected type or shape.
MALFORMED = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)

# A network's arguments in the user's words: flags, and what follows from the data.
ARGUMENT_NAMES = {
    'img_resolution': "the resolution of the data's images", 'img_channels': "the number of the images' channels",
    'label_dim': 'the number of classes (--cond)', 'augment_dim': 'the number of augmentation labels (--augment-with)',
    'use_fp16': '--fp16', 'dropout': '--dropout',
    **{name: f'--arch ({name})' for arguments in ARCHITECTURES.values() for name in arguments},
    **{name: flag_of(flag) for model in MODELS.values() for flag, name in model.size_arguments.items()},
}

# Arguments of a network that change how it is trained, not what its tensors mean: a run may resume with others.
REGIME = ('use_fp16', 'dropout')

# What a state's settings say of the run besides its network: {name: how a message introduces its value}.
ORIGIN_SHOWN_AS = {'system': '--precond=', 'augmentations': '--augment-with=', 'optimizer': 'the optimizer ',
                   'loss': 'the loss options '}
ORIGIN_IF_UNRECORDED = {'optimizer': 'Adam'}  # of states from before it was recorded

MAX_SEED = (1 << 32) - 1  # the largest of NumPy's generators, which make the training order


@dataclasses.dataclass
class Progress:
    """How far a run has come.

    Attributes:
        nimg: Images seen.
        tick: Ticks completed.
        tick_nimg: Images seen when the current tick began.
        nonfinite: Steps of the current tick whose loss or gradients were not finite.
        seconds: Time spent.
    """

    nimg: int = 0
    tick: int = 0
    tick_nimg: int = 0
    nonfinite: int = 0
    seconds: float = 0.0


def checked_seed(seed):
    """`seed` as a plain int, as states store it.

    Raises:
        UserError: it is not a whole number from 0 to MAX_SEED.
    """
    if not isinstance(seed, numbers.Integral) or not 0 <= seed <= MAX_SEED:
        raise UserError(f'the seed {seed} is not a whole number from 0 to {MAX_SEED}; choose one in that range')
    return int(seed)


def run_state(net, ema, optimizer, progress, settings, last_tick):
    """The content of a training state. Call on all ranks.

    Args:
        net, optimizer: Referenced, not copied: save or copy the result before they change.
        ema: State dict of the EMA network.
        settings: Plain values of this run that its command line alone does not determine (such as a drawn seed).
        last_tick: Statistics of the last completed tick, for stats.jsonl.
    """
    return dict(net=net.state_dict(), ema=ema, optimizer=optimizer.state_dict(), network_kwargs=net.init_kwargs,
                ranks=dist.gather_objects(dict(random=random_state(), statistics=training_stats.unread())),
                progress=dataclasses.asdict(progress), settings=settings, last_tick=json.dumps(last_tick))


def load_run_state(path):
    """The content of a training state as it was saved, compact or not.

    Raises:
        UserError: as for `load_state`; or the content is not what `run_state` makes.
    """
    state = load_state(path)
    try:
        sound = _is_run_state(state)
    except MALFORMED:
        sound = False
    if not sound:
        raise UserError(f'{path} lacks some of what is needed to resume a run; resume from another training-state-*.pt')
    return state


def _is_run_state(state):
    """Whether all entries are there and of the right types. `restore` finds out whether the tensors fit the network."""
    progress, settings = Progress(**state['progress']), state['settings']
    counts = [progress.nimg, progress.tick, progress.tick_nimg, progress.nonfinite]
    ratio = settings['ema_rampup_ratio']
    return (all(isinstance(state[name], dict) for name in ('net', 'optimizer', 'network_kwargs'))
            and isinstance(state['ema_difference' if is_compact(state) else 'ema'], dict)
            and all(_is_below(1 << 53, count, int) for count in counts)
            and _is_below(1e10, progress.seconds, int, float)
            and _is_below(MAX_SEED + 1, settings['seed'], int)
            and (ratio is None or _is_below(1e10, ratio, int, float))
            and isinstance(json.loads(state['last_tick']), dict)
            and isinstance(state['ranks'], list) and state['ranks'] and all(map(_is_of_a_rank, state['ranks'])))


def _is_below(end, value, *kinds):
    return type(value) in kinds and 0 <= value < end


def _is_of_a_rank(entry):
    return (all(isinstance(random, torch.Tensor) and random.dtype == torch.uint8 for random in entry['random'].values())
            and 'cpu' in entry['random']
            and all(type(name) is str and moments.shape == (3,) and moments.dtype == torch.float64
                    for name, moments in entry['statistics'].items()))


def resume_from(path):
    """Load a training state, expanded if it is compact; prints where the run starts from. Call on all ranks.

    Raises:
        UserError: as for `load_run_state`.
    """
    dist.print0(f'Resuming from {path}...')
    state = load_run_state(path)
    if not is_compact(state):
        return state
    dist.print0('This state is compact: the run continues close to where it was, but no longer bit for bit.')
    with _refusing(path):
        return expand(state)


def check_origin(settings, path, **origin):
    """Raise UserError if a state is of another kind of run, even one with tensors of the same names and shapes.

    Args:
        settings: The state's; what those of older states do not record is taken as equal.
        path: For the message.
        origin: What this run has, by the names in ORIGIN_SHOWN_AS.

    Raises:
        UserError: they differ.
    """
    def shown(value):
        return excerpt(' '.join(as_flags(value)) if isinstance(value, dict) else value or '') or 'none'

    before = {**origin, **ORIGIN_IF_UNRECORDED, **settings}
    for name, now in origin.items():
        if before[name] != now:
            raise UserError(f'{path} is from a run with {ORIGIN_SHOWN_AS[name]}{shown(before[name])}, '
                            f'not {shown(now)}; resume with that, or start from a snapshot of it with --transfer')


def warn_if_dataset_changed(settings, dataset):
    """Print a warning if the data set is not the one in a state's settings: another name, or number of files."""
    now = dict(dataset=dataset.name, num_images=dataset.num_files)
    before = {**now, **{name: settings[name] for name in now if name in settings}}
    if before != now:
        def shown(data):
            return f"{excerpt(data['dataset'])} ({excerpt(data['num_images'])} images)"
        dist.print0(f'Warning: this run was trained on {shown(before)} and continues with {shown(now)}.')


def check_network(network_kwargs, path, net, options=()):
    """Raise UserError if a state is of a run with another network.

    Args:
        network_kwargs: The state's.
        path: For the message.
        net: The network that is to continue from it (training.precond.Precond).
        options: Those of its arguments that train.py has as flags of the same names, for the message.

    Raises:
        UserError: they differ in meaning, REGIME apart.
    """
    with _refusing(path):
        changed = _changes(network_kwargs, net, {**ARGUMENT_NAMES, **{name: flag_of(name) for name in options}})
    changed = [change for name, change in changed.items() if name not in REGIME]
    if changed:
        raise UserError(f"{path} is from a run with another network: {', '.join(changed)}; resume with that run's "
                        'options, or start another run beside it: without --resume or --auto-resume, with --desc=… or '
                        'another --outdir')


def _changes(network_kwargs, net, names):
    """{argument: sentence} where the arguments of `net` and a state's network differ; `names` in the user's words."""
    before, now = net.meaning(network_kwargs), net.meaning(net.init_kwargs)
    return {name: f'{names.get(name) or excerpt(name)} was {_shown(before.get(name))} there and is '
                  f'{_shown(now.get(name))} here' for name in {**before, **now} if before.get(name) != now.get(name)}


def _shown(value):
    """An argument of a network as the user types it."""
    if value is None:
        return 'not set'
    if isinstance(value, (list, tuple)):
        value = ','.join(map(str, value))
    return excerpt(int(value) if isinstance(value, bool) else value)


def restore(state, path, net, ema, optimizer):
    """Restore network, EMA and optimiser from a state.

    Raises:
        UserError: the state belongs to another network.
    """
    check_network(state['network_kwargs'], path, net)
    for change in _changes(state['network_kwargs'], net, ARGUMENT_NAMES).values():
        dist.print0(f'Warning: {change}.')
    with _refusing(path):
        net.load_state_dict(state['net'])
        ema.load_state_dict(state['ema'])
        load_optimizer(optimizer, state['optimizer'])


@contextlib.contextmanager
def _refusing(path):
    """Context that turns any failure on a state's content into a UserError that names the file."""
    try:
        yield
    except (*MALFORMED, UserError) as e:
        reason = excerpt(' '.join(str(e).split()), 200)
        raise UserError(f'{path} does not fit this run ({type(e).__name__}: {reason}); resume from another '
                        'training-state-*.pt, or with the versions of this program and PyTorch that wrote it') from e


def load_optimizer(optimizer, saved):
    """Load Adam's moments and step counts, or what another optimiser keeps: numbers, and tensors like the parameters.

    Its options, and the kernels it uses, remain those of this run.

    Raises:
        ValueError: they do not fit the parameters.
    """
    groups = [{**now, 'params': then['params']} for then, now in zip(saved['param_groups'], optimizer.param_groups)]
    optimizer.load_state_dict({'state': saved['state'], 'param_groups': groups})
    adam = isinstance(optimizer, torch.optim.Adam)
    for param, entry in optimizer.state.items():
        own = tuple(param.shape)
        shapes = {name: () if type(value) in (int, float) else tuple(value.shape) for name, value in entry.items()}
        needed = {'step': (), **dict.fromkeys(MOMENTS, own)} if adam else {}
        if not needed.items() <= shapes.items() or not set(shapes.values()) <= {(), own}:
            raise ValueError(f'moments of the shapes {shapes} for a parameter of {own}')


def random_state():
    """This rank's random state, as tensors."""
    state = {'cpu': torch.get_rng_state()}
    if torch.cuda.is_available():
        state['cuda'] = torch.cuda.get_rng_state()
    return state


def seed_rank(seed, state=None, path=None):
    """Give each rank its own noise; with a state recorded by as many ranks, continue from its random state.

    Raises:
        UserError: the state in the file `path` holds no random state for this version of PyTorch.
    """
    ranks, rank = dist.get_world_size(), dist.get_rank()
    nimg = state['progress']['nimg'] if state is not None else 0
    torch.manual_seed(int(np.random.SeedSequence([seed, rank, nimg]).generate_state(1)[0]))
    if state is not None and len(state['ranks']) == ranks:
        own = state['ranks'][rank]
        training_stats.restore(own['statistics'])
        with _refusing(path):
            torch.set_rng_state(own['random']['cpu'])
            if torch.cuda.is_available() and 'cuda' in own['random']:
                torch.cuda.set_rng_state(own['random']['cuda'])
        return
    training_stats.restore({})
    if state is not None:
        dist.print0(f"The run was saved by {len(state['ranks'])} ranks and continues with {ranks}: "
                    'the data order is kept, but the noise differs.')
