"""The one exception for what the user can mend."""

import click


class UserError(click.ClickException):
    """Bad input: one sentence that names the thing and the remedy.

    As a ``click.ClickException`` it ends a command with ``Error: …`` and exit code 1, without a
    traceback; in library use it is an ordinary exception whose ``str()`` is the sentence.
    """
