"""Small conversions between text and numbers, for command lines and status lines."""

import re

from dnnlib.errors import UserError

NUMBER = r'\d{1,18}'  # such as a seed: fits in 64 bits
MAX_INTS = 10_000_000  # in a list; far more than anyone draws, and all of them still fit into memory


def excerpt(text, limit=80):
    """Untrusted text as a message may quote it: its first `limit` characters ('…' for the rest), all printable."""
    text = str(text)
    return text[:limit].encode('unicode_escape').decode('ascii') + ('…' if len(text) > limit else '')


def parse_int_list(text):
    """'1,2,5-10' → [1, 2, 5, 6, 7, 8, 9, 10]; a list of ints is returned as it is.

    Raises:
        UserError: a part that is neither an integer of at most 18 digits nor an increasing range; too many
            numbers (MAX_INTS).
    """
    if isinstance(text, (list, tuple)):
        return list(text)
    text = str(text)
    values = []
    for part in text.split(','):
        m = re.fullmatch(rf'\s*({NUMBER})(?:-({NUMBER}))?\s*', part)
        if not m or (m[2] and int(m[2]) < int(m[1])):
            reason = 'goes backwards' if m else 'cannot be read'
            raise UserError(f"'{excerpt(text, 100)}' is not a list of integers such as 1,2,5-10: "
                            f"'{excerpt(part, 100)}' {reason}")
        span = range(int(m[1]), int(m[2] or m[1]) + 1)
        if len(values) + len(span) > MAX_INTS:
            raise UserError(f"'{excerpt(text, 100)}' names more than {MAX_INTS:,} numbers; give a shorter list, "
                            'such as 0-49999')
        values.extend(span)
    return values


def parse_seeds(text):
    """`parse_int_list`, each number once.

    Raises:
        UserError: also for a number that occurs twice.
    """
    seeds = parse_int_list(text)
    check_once(seeds)
    return seeds


def check_once(seeds, where='--seeds'):
    """Raise UserError for a seed that occurs twice: its image would be drawn twice, written once, and count twice."""
    if len(set(seeds)) < len(seeds):
        seen = set()
        twice = next(seed for seed in seeds if seed in seen or seen.add(seed))
        raise UserError(f'the seed {twice} occurs twice in {where}, which would count the same image twice; '
                        'give each once')


def format_int_list(values):
    """[1, 2, 5, 6, 7] → '1,2,5-7', which `parse_int_list` reads."""
    runs = []
    for value in values:
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    parts = []
    for first, last in runs:
        if last - first > 1:
            parts.append(f'{first}-{last}')
        else:
            parts.extend(map(str, range(first, last + 1)))
    return ','.join(parts)


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
