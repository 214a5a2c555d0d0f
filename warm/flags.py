"""Flags that several commands share: the samplers' flags, and system-specific flags made from the registry."""

import click

from dnnlib import UserError
from dnnlib.flags import Key, Number, NumberRange, Text
from torch_utils.precision import PRECISIONS
from training.samplers import DISCRETIZATIONS, SCALINGS, SCHEDULES
from training.system import own_options
from warm.presets import preset_option
from warm.samplers import SAMPLER_DEFAULTS, SOLVERS
from warm.systems import SYSTEMS


class_flag = click.option('--class', 'class_idx', metavar='INT', type=click.IntRange(min=0), default=None,
                          help='Class of all images  [default: random]')

compile_flag = click.option('--compile', is_flag=True, default=None, show_default=False,
                            help='Compile the network for this machine: takes minutes at first, then runs faster')

# How the network runs; None leaves it as it is.
RUN_FLAGS = (
    click.option('--precision', type=click.Choice(list(PRECISIONS)), default=None,
                 help='Precision of the network; the rest is float32  [default: fp32; fp16 if trained in it]'),
    compile_flag,
)

# The samplers' flags; None leaves the value to the sampler.
SAMPLER_FLAGS = (
    click.option('--steps', 'num_steps', metavar='INT', type=click.IntRange(min=1), default=None,
                  help=f"Number of steps  [default: the system's, {SAMPLER_DEFAULTS['num_steps']} for EDM and Warm]"),
    click.option('--sigma_min', metavar='FLOAT', type=NumberRange(min=0, min_open=True), default=None,
                  help=f"Lowest noise level  [default: {SAMPLER_DEFAULTS['sigma_min']:g}, or the ablation's]"),
    click.option('--sigma_max', metavar='FLOAT', type=NumberRange(min=0, min_open=True), default=None,
                  help=f"Highest noise level  [default: {SAMPLER_DEFAULTS['sigma_max']:g}, or the ablation's]"),
    click.option('--rho', metavar='FLOAT', type=NumberRange(min=0, min_open=True), default=None,
                  help=f"Exponent of the time steps  [default: {SAMPLER_DEFAULTS['rho']:g}]"),
    click.option('--S_churn', 'S_churn', metavar='FLOAT', type=NumberRange(min=0), default=None,
                  help=f"Stochasticity strength  [default: {SAMPLER_DEFAULTS['S_churn']:g}]"),
    click.option('--S_min', 'S_min', metavar='FLOAT', type=NumberRange(min=0), default=None,
                  help=f"Lowest noise level with stochasticity  [default: {SAMPLER_DEFAULTS['S_min']:g}]"),
    click.option('--S_max', 'S_max', metavar='FLOAT', type=NumberRange(min=0, infinite=True), default=None,
                  help=f"Highest noise level with stochasticity  [default: {SAMPLER_DEFAULTS['S_max']:g}]"),
    click.option('--S_noise', 'S_noise', metavar='FLOAT', type=Number(), default=None,
                  help=f"Inflation of the noise  [default: {SAMPLER_DEFAULTS['S_noise']:g}]"),
    click.option('--solver', type=Key(SOLVERS), default=None,
                  help='ODE solver; on EDM networks euler and heun select the ablation sampler  '
                       f"[default: {SAMPLER_DEFAULTS['solver']}]"),
    click.option('--disc', 'discretization', type=click.Choice(list(DISCRETIZATIONS)), default=None,
                  help='Ablation: time steps'),
    click.option('--schedule', type=click.Choice(list(SCHEDULES)), default=None, help='Ablation: noise schedule'),
    click.option('--scaling', type=click.Choice(list(SCALINGS)), default=None, help='Ablation: signal scaling'),
)


def sampler_flags(command):
    """Decorator that adds the sampling flags: how the network runs, the samplers', system-specific ones, --preset."""
    command = system_flags('own_sample_options')(command)
    for option in reversed(RUN_FLAGS + SAMPLER_FLAGS):
        command = option(command)
    return preset_option('sample')(command)


class SystemFlag(click.Option):
    """A flag made from an Option, with a name that no other flag of the command has, as it would hide that flag.

    Raises:
        UserError: the name is taken; raised when the command runs, since only then are all its flags known.
    """

    def add_to_parser(self, parser, ctx):
        for other in ctx.command.params:
            if other is not self and (other.name == self.name or set(other.opts) & set(self.opts)):
                raise UserError(f"the Option '{self.name}' of a system collides with {other.opts[0]}, which "
                                f'{ctx.command_path} already has; give the Option another name')
        super().add_to_parser(parser, ctx)


TYPES = {float: Number(), str: Text()}  # type of an Option → type of its flag, where they differ


def system_flags(attribute):
    """Decorator that adds a click option for each Option in the systems' lists `attribute` (training.system.System)."""
    def decorate(command):
        for option, names in reversed(own_options(SYSTEMS, attribute).items()):
            default = option.shown or option.default
            command = click.option(option.flag, option.name, metavar=_metavar(option.type), cls=SystemFlag,
                                   type=TYPES.get(option.type, option.type), default=None,
                                   help=f"{option.help} ({', '.join(names)} only)  [default: {default}]")(command)
        return command
    return decorate


def typed_flags(*names):
    """Those of these flags, as typed, that the user gave on the command line; presets and defaults do not count.

    Args:
        names: Python names of flags of the running command.
    """
    ctx = click.get_current_context()
    others = (click.core.ParameterSource.DEFAULT, click.core.ParameterSource.DEFAULT_MAP)
    return [param.opts[0] for param in ctx.command.params
            if param.name in names and ctx.get_parameter_source(param.name) not in others]


def given_flags(attribute, values):
    """{name: value} of the Options in the systems' lists `attribute` that have a value in `values`, click's."""
    names = {option.name for option in own_options(SYSTEMS, attribute)}
    return {name: value for name, value in values.items() if name in names and value is not None}


def _metavar(kind):
    return {str: 'STR', int: 'INT', float: 'FLOAT', bool: 'BOOL'}.get(kind)
