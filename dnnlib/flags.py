"""Types of command-line flags that refuse what click's own let through: NaN, infinity, empty text."""

import math

import click


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


class Text(click.types.StringParamType):
    """Text that is not blank: blank text most often comes from a shell variable that is not set."""

    def convert(self, value, param, ctx):
        text = super().convert(value, param, ctx)
        if not text.strip():
            self.fail('it is empty; give it a value (is a variable of the shell not set?) or leave the flag out',
                      param, ctx)
        return text
