"""Opening a snapshot for sampling with the user's flags: what generate.py and fid.py have in common."""

import dataclasses
import numbers

import torch

from dnnlib import UserError
from torch_utils import distributed as dist
from training.acceleration import RUN_OPTIONS, accelerate
from training.generation import check_class
from training.provenance import difference, network_facts
from training.snapshot import Snapshot, build_network, read_snapshot
from training.system import System
from warm.starts import data_for
from warm.systems import SYSTEMS


MAX_STEPS = 10_000  # of sampling; a mistyped number would keep the command busy for hours without a word


def check_max_steps(options, shown):
    """Raise UserError if the sampler's options ask for more than MAX_STEPS steps; `shown` is the flag to name."""
    steps = options.get('num_steps')
    if isinstance(steps, numbers.Integral) and steps > MAX_STEPS:
        raise UserError(f'{shown}={steps} is more than the {MAX_STEPS} steps that a sampler may take; give fewer')


@dataclasses.dataclass
class OpenNetwork:
    """A network ready to sample from.

    Attributes:
        snapshot, net, system: The network as read, as built (on this rank's device), and its System.
        options: The sampler options given, plus the training data filled in for systems that start from it.
        sampler: callable(latents, class_labels, randn_like).
        facts: Everything that determines a seed's image (`training.provenance.network_facts`).
    """

    snapshot: Snapshot
    net: torch.nn.Module
    system: System
    options: dict
    sampler: object
    facts: dict

    def difference(self, recorded):
        """How recorded images differ from this network's (`training.provenance.difference`)."""
        return difference(recorded, self.facts, self.net, self.system)


def open_network(path_or_url, sampler_options, class_idx=None):
    """Read a snapshot, build its network and make its sampler; rank 0 goes first, so a download happens once.

    Args:
        path_or_url: The snapshot.
        sampler_options: Values of `sampler_flags` and RUN_OPTIONS, None where the user gave none.
        class_idx: Class of all images, or None.

    Raises:
        UserError: the file is not a snapshot; more than MAX_STEPS; an option or class that its system does not have.
    """
    check_max_steps(sampler_options, '--steps')
    snapshot = dist.first_on_rank0(lambda: read_snapshot(path_or_url))
    net = build_network(snapshot, SYSTEMS, dist.device())
    system = SYSTEMS[snapshot.system]
    options = {name: value for name, value in sampler_options.items() if value is not None}
    run_options = {name: options.pop(name) for name in RUN_OPTIONS if name in options}
    accelerate(net, **run_options, cuda_graphs=True)
    if system.starts_from_data:
        options['data'] = data_for(snapshot, options.get('data'))
    sampler = system.make_sampler(net, options)
    check_class(net, class_idx)
    facts = network_facts(snapshot, net, system, options, sampler, class_idx)
    return OpenNetwork(snapshot, net, system, options, sampler, facts)
