"""More sampling options for systems whose network is a denoiser D(x; σ) and whose sampler is EDM's."""

import dataclasses
import functools

from dnnlib import UserError
from training.samplers import SOLVERS as EDM_SOLVERS
from training.system import COMMON_SAMPLE_OPTIONS, flag_of
from warm.samplers import SAMPLER_DEFAULTS, SOLVERS, check_foreign, options_of, warm_sampler, with_defaults
from warm.systems.epsilon_scaling import with_epsilon_scaling


def with_multistep(system):
    """A copy of `system` with those solvers of warm.samplers that EDM lacks (dpmpp2m), at BNR 0."""
    def own():
        return options_of([name for name in SOLVERS if name not in EDM_SOLVERS])

    def sampler(net, **options):
        own_names = [option.name for option in own()]  # now, as a script may have added a solver
        solver = options.get('solver') or SAMPLER_DEFAULTS['solver']
        if solver in EDM_SOLVERS:
            for name in options.keys() & own_names:
                check_foreign(name, options.pop(name), solver)
            return system.sampler(net, **options)
        for name in options:
            if name not in (*COMMON_SAMPLE_OPTIONS, 'solver', *own_names):
                raise UserError(f'--solver={solver} does not take {flag_of(name)}; leave it out or use '
                                f"--solver={' or '.join(EDM_SOLVERS)}")
        with_defaults(options)  # for its checks
        return functools.partial(warm_sampler, **options)
    return dataclasses.replace(system, sampler=sampler, own_sample_options=(*system.own_sample_options, *own()))


def edm_like(system):
    """A copy of `system` with these solvers and epsilon scaling."""
    return with_epsilon_scaling(with_multistep(system))
