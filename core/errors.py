"""The one exception for bad input."""


class InputError(ValueError):
    """Bad input found before any work: the message names the thing and the remedy.

    The command line prints it as one line and exits with code 2, without a traceback.
    """
