"""The registry of systems: what --precond offers, what a snapshot may be of. A new system is one line here."""

import dataclasses
import functools

from dnnlib import UserError
from training.samplers import SOLVERS as EDM_SOLVERS
from training.system import COMMON_SAMPLE_OPTIONS, EDM_SYSTEMS, flag_of
from warm.blurring import BLURRING
from warm.cold import COLD
from warm.epsilon_scaling import with_epsilon_scaling
from warm.ihdm import IHDM
from warm.lee import LEE
from warm.pfgmpp import PFGMPP, with_heavy_tails
from warm.samplers import SAMPLER_DEFAULTS, SOLVERS, check_foreign, options_of, warm_sampler, with_defaults
from warm.soft import SOFT
from warm.stf import STF
from warm.warm import WARM


def with_multistep(system):
    """An EDM system with those solvers of warm.samplers, at BNR 0, that EDM has not: dpmpp2m."""
    added = [name for name in SOLVERS if name not in EDM_SOLVERS]
    own = options_of(added)
    own_names = [option.name for option in own]

    def sampler(net, **options):
        solver = options.get('solver')
        if solver not in added:
            for name in options.keys() & own_names:
                check_foreign(name, options.pop(name), solver or SAMPLER_DEFAULTS['solver'])
            return system.sampler(net, **options)
        for name in options:
            if name not in (*COMMON_SAMPLE_OPTIONS, 'solver', *own_names):
                raise UserError(f'--solver={solver} has no {flag_of(name)}; leave it out or choose '
                                f"{' or '.join(EDM_SOLVERS)}")
        with_defaults(options)
        return functools.partial(warm_sampler, **options)
    return dataclasses.replace(system, sampler=sampler, own_sample_options=(*system.own_sample_options, *own))


def edm_like(system):
    """A system whose network is a denoiser D(x; σ) and whose sampler is EDM's, with all that can be done with such."""
    return with_epsilon_scaling(with_multistep(system))


SYSTEMS = {system.name: system for system in (
    *map(edm_like, EDM_SYSTEMS),
    WARM,
    BLURRING,
    LEE,
    IHDM,
    COLD,
    SOFT,
    edm_like(STF),
    with_epsilon_scaling(PFGMPP, with_heavy_tails),
)}
