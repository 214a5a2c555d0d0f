"""Command-line flags: numbers and text without what click's own let through, keys of registries; the `Tool` command."""

import errno
import math

import click

from dnnlib.errors import UserError


class Tool(click.Command):
    """A command whose defaults and long lines are shown, and that says so if standard output is full."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, context_settings=dict(show_default=True, max_content_width=120), **kwargs)

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except OSError as e:
            if e.errno != errno.ENOSPC:
                raise
            raise UserError(f'standard output cannot be written ({e.strerror}); send it elsewhere, and run the '
                            'command again') from e


class Number(click.types.FloatParamType):
    """A number that is neither NaN nor infinite."""

    infinite = False

    def convert(self, value, param, ctx):
        number = super().convert(value, param, ctx)
        if math.isnan(number) or (math.isinf(number) and not self.infinite):
            self.fail(f"'{value}' is not a finite number", param, ctx)
        return number


class NumberRange(Number, click.FloatRange):
    """A `Number` within bounds. Bounds alone would let NaN pass: no comparison with it is true.

    Args:
        infinite: Whether infinity is allowed, as for the end of a range.
        kwargs: As for click.FloatRange: min, max, min_open, max_open.
    """

    def __init__(self, infinite=False, **kwargs):
        super().__init__(**kwargs)
        self.infinite = infinite


class Key(click.Choice):
    """A key of a registry, which may still grow after the command has been made."""

    def __init__(self, registry):
        self._registry = registry
        super().__init__(registry)

    @property
    def choices(self):
        """The keys at this moment, in place of click's attribute."""
        return tuple(self._registry)

    @choices.setter
    def choices(self, _):
        pass  # click's constructor would keep a copy


class Text(click.types.StringParamType):
    """Text that is not blank: blank text most often comes from a shell variable that is not set."""

    def convert(self, value, param, ctx):
        text = super().convert(value, param, ctx)
        if not text.strip():
            self.fail('it is empty; give it a value (is a variable of the shell not set?) or leave the flag out',
                      param, ctx)
        return text
