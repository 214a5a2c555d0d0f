"""JSON files of one object, or one per line: what is malformed reads as none, what is written is standard JSON."""

import json
import math
import os
import pathlib

from dnnlib.errors import UserError
from dnnlib.files import check_appendable

MAX_LINE = 1 << 20  # bytes of a line of JSON; those written here are far shorter


def parse_object(text):
    """The JSON object (a dict) in a text; None if there is none, e.g. if it is cut off or nested too deeply."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def read_object(path):
    """`parse_object` of a file; also None if it cannot be read."""
    try:
        return parse_object(pathlib.Path(path).read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return None


def read_lines(path):
    """The objects in a file of JSON lines; [] if there is no file. A line cut off by a crash is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding='utf-8', errors='replace').splitlines()
    return [record for record in map(parse_object, lines) if record is not None]


def json_line(record):
    """`record` as a line of JSON, which has neither NaN nor infinity: they become null."""
    return json.dumps(_finite(record), allow_nan=False) + '\n'


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def append_line(path, record, remedy):
    """Append `record` as one line (`json_line`); `remedy` ends the error message if that fails.

    Raises:
        UserError: the disk is full, gone or read-only.
    """
    try:
        with open(path, 'a', encoding='utf-8') as f:
            f.write(json_line(record))
    except OSError as e:
        raise UserError(f'could not write {path}: {e.strerror or e}; {remedy}') from e


def check_json_lines(path):
    """Raise UserError unless lines of JSON can be appended to `path`: a .jsonl, or a file beginning with an object."""
    check_appendable(path)
    if os.path.exists(path) and not os.path.isfile(path):  # /dev/null
        return
    if not os.fspath(path).lower().endswith('.jsonl') and not _begins_with_object(path):
        raise UserError(f'{path} is not a file of JSON lines; give a name ending in .jsonl')


def _begins_with_object(path):
    try:
        with open(path, 'rb') as f:
            return parse_object(f.readline(MAX_LINE)) is not None
    except OSError:
        return False
