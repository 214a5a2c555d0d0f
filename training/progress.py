"""Where a training run stands, and what it takes to go on from there bit for bit."""

import dataclasses
import json

import numpy as np
import torch

from dnnlib import UserError
from torch_utils import distributed as dist
from torch_utils import training_stats


@dataclasses.dataclass
class Progress:
    """Where a run stands.

    Attributes:
        nimg: Images seen.
        tick: Ticks ended.
        tick_nimg: Images seen when the present tick began.
        nonfinite: Steps of the present tick whose loss or gradients were not finite.
        seconds: Time spent.
    """

    nimg: int = 0
    tick: int = 0
    tick_nimg: int = 0
    nonfinite: int = 0
    seconds: float = 0.0


def run_state(net, ema, optimizer, progress, settings, last_tick):
    """The content of a training state. Call on all ranks.

    Args:
        net, optimizer: As they are; `save_state` or a copy has to follow before they change.
        ema: State dict of the moving average.
        settings: Plain values of this run that its command line alone doesn't tell (the seed drawn, for one).
        last_tick: Statistics of the last tick that ended, for stats.jsonl.
    """
    return dict(net=net.state_dict(), ema=ema, optimizer=optimizer.state_dict(), network_kwargs=net.init_kwargs,
                ranks=dist.gather_objects(dict(random=random_state(), statistics=training_stats.unread())),
                progress=dataclasses.asdict(progress), settings=settings, last_tick=json.dumps(last_tick))


def restore(state, path, net, ema, optimizer):
    """Bring network, moving average and optimiser to the recorded point.

    Raises:
        UserError: the state belongs to another network.
    """
    before, now = state['network_kwargs'], net.init_kwargs
    changed = sorted(k for k in {**before, **now} if before.get(k) != now.get(k))
    if changed:
        raise UserError(f"{path} was saved by a run whose network differs in {', '.join(changed)}; "
                        'resume with the options of that run, see its training_options.json')
    net.load_state_dict(state['net'])
    ema.load_state_dict(state['ema'])
    load_optimizer(optimizer, state['optimizer'])


def load_optimizer(optimizer, saved):
    """Load an optimiser's state, whatever device it was made on: which kernels to use is this run's own choice."""
    groups = [{**then, **{k: now[k] for k in ('fused', 'foreach', 'capturable')}}
              for then, now in zip(saved['param_groups'], optimizer.param_groups)]
    optimizer.load_state_dict({**saved, 'param_groups': groups})


def random_state():
    """This rank's random state, as tensors."""
    state = {'cpu': torch.get_rng_state()}
    if torch.cuda.is_available():
        state['cuda'] = torch.cuda.get_rng_state()
    return state


def seed_rank(seed, state=None):
    """Give each rank noise of its own; from a recorded state, continue it where the number of ranks is the same."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    if state is not None and len(state['ranks']) == ranks:
        own = state['ranks'][rank]
        training_stats.restore(own['statistics'])
        torch.set_rng_state(own['random']['cpu'])
        if torch.cuda.is_available() and 'cuda' in own['random']:
            torch.cuda.set_rng_state(own['random']['cuda'])
        return
    training_stats.restore({})
    nimg = 0
    if state is not None:
        nimg = state['progress']['nimg']
        dist.print0(f"The run was saved by {len(state['ranks'])} ranks and goes on with {ranks}: "
                    'the data continues in order, the noise differs.')
    torch.manual_seed(int(np.random.SeedSequence([seed, rank, nimg]).generate_state(1)[0]))
