"""The one exception for what the user can fix, and the check that most often raises it, of a choice by name."""

import click


MAX_LENGTH = 1500


class UserError(click.ClickException):
    """Bad input: one sentence that names the thing and the remedy.

    As a click.ClickException it ends a command with `Error: …` and exit code 1, without a
    traceback; in library use it is an ordinary exception whose str() is the sentence. As it may quote a file
    with any content, it is kept to one line of printable characters, and short.
    """

    def __init__(self, message):
        text = ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in str(message))
        super().__init__(text if len(text) <= MAX_LENGTH else f'{text[:MAX_LENGTH]} …')


def chosen(what, name, table):
    """table[name], or just the name if `table` is a collection of names, such as a tuple.

    Args:
        what: What is chosen, for the message, such as 'solver'.
        name: The choice.
        table: {name: value}, or names.

    Raises:
        UserError: the name is not in the table.
    """
    if name not in table:
        raise UserError(f"there is no {what} '{name}'; choose one of {', '.join(table)}")
    return table[name] if isinstance(table, dict) else name
