"""The one exception that a user is meant to see.

`cli.main` turns a `UserError` into one line on standard error and exit code 2. Everything else is a
failure of ours: a traceback and exit code 1.
"""


class UserError(ValueError):
    """Bad input: a recipe, data set, checkpoint or cluster that cannot be used as it is.

    The message is one line that names the file, the field or the item, says what was found, and what to do.
    """


class BadItem(UserError):
    """One unusable item among others: set aside with its reason while the run goes on."""


class Stopped(Exception):
    """A run was asked to stop, has saved and left. The message says how far it is."""
