"""The two ways a command ends early on purpose."""


class InputError(ValueError):
    """Bad input found before any work: the message names the thing and the remedy.

    The command line prints it as one line and exits with code 2, without a traceback.
    """


class Preempted(Exception):
    """A run was told to stop; it has saved what it did, and the same command continues it."""
