"""Small conversions between text and numbers, for command lines and status lines."""

import re

from dnnlib.errors import UserError


def parse_int_list(text):
    """'1,2,5-10' → [1, 2, 5, 6, 7, 8, 9, 10]; a list of ints is returned as it is.

    Raises:
        UserError: a part that is neither an integer nor an increasing range.
    """
    if isinstance(text, (list, tuple)):
        return list(text)
    values = []
    for part in str(text).split(','):
        m = re.fullmatch(r'\s*(\d+)(?:-(\d+))?\s*', part)
        if not m or (m[2] and int(m[2]) < int(m[1])):
            raise UserError(f"'{text}' is not a list of integers such as 1,2,5-10: '{part}' cannot be read")
        values.extend(range(int(m[1]), int(m[2] or m[1]) + 1))
    return values


def format_int_list(values):
    """[1, 2, 5, 6, 7] → '1,2,5-7', which `parse_int_list` reads."""
    runs = []
    for value in values:
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ','.join(f'{a}' if a == b else f'{a},{b}' if b == a + 1 else f'{a}-{b}' for a, b in runs)


def format_time(seconds):
    """Seconds → '45s', '3m 05s', '2h 07m 10s' or '1d 03h 02m'."""
    s = max(int(round(seconds)), 0)
    if s < 60:
        return f'{s}s'
    if s < 3600:
        return f'{s // 60}m {s % 60:02d}s'
    if s < 86400:
        return f'{s // 3600}h {s // 60 % 60:02d}m {s % 60:02d}s'
    return f'{s // 86400}d {s // 3600 % 24:02d}h {s // 60 % 60:02d}m'
