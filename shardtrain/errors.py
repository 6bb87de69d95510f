"""The one exception that means "you can fix this"."""


class UserError(ValueError):
    """A mistake in what the user asked for.

    The message names the value, the rule that it breaks, and what to change. The command line prints it without
    a traceback and exits with code 2; any other exception is a bug of ours.
    """
