"""Flags of train.py and generate.py that only some systems have, made from the registry."""

import click

from training.system import own_options
from warm.systems import SYSTEMS


def system_flags(attribute):
    """Decorator that adds a click option for each Option in the systems' lists `attribute` (training.system.System)."""
    def decorate(command):
        for option, names in reversed(own_options(SYSTEMS, attribute).items()):
            default = option.shown or option.default
            command = click.option(option.flag, option.name, metavar=_metavar(option.type), type=option.type,
                                   default=None, help=f"{option.help} ({', '.join(names)} only)  [default: {default}]",
                                   )(command)
        return command
    return decorate


def given_flags(attribute, values):
    """The part of the click values that belongs to those options and was given by the user."""
    names = {option.name for option in own_options(SYSTEMS, attribute)}
    return {name: value for name, value in values.items() if name in names and value is not None}


def _metavar(kind):
    return {str: 'STR', int: 'INT', float: 'FLOAT', bool: 'BOOL'}.get(kind)
