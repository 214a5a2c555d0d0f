"""The one exception for what the user can mend."""

import click


MAX_LENGTH = 1500


class UserError(click.ClickException):
    """Bad input: one sentence that names the thing and the remedy.

    As a ``click.ClickException`` it ends a command with ``Error: …`` and exit code 1, without a
    traceback; in library use it is an ordinary exception whose ``str()`` is the sentence. What it quotes of a file
    may be anything: it is kept to one line of printable characters, and short.
    """

    def __init__(self, message):
        text = ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in str(message))
        super().__init__(text if len(text) <= MAX_LENGTH else f'{text[:MAX_LENGTH]} …')
