"""What a user can get wrong."""


class UserError(ValueError):
    """Bad input. The message is one line: what was expected, what was given, what to do.

    The command line prints it and ends with exit code 2. It takes one plain argument, so it survives pickling.
    """


class SearchFailed(RuntimeError):
    """The search cannot go on for a reason that lies in the model or the data (exit code 1)."""


class NotFinite(SearchFailed):
    """What a model says is no number, so that it cannot be judged (exit code 1)."""


class RecoveryFailed(SearchFailed):
    """A training cannot go on (exit code 1)."""


class DeviceMemoryError(SearchFailed):
    """A device ran out of memory. Smaller calls may fit: whoever asked for the work decides."""


def first_line(error: BaseException) -> str:
    """An error in one line: the first of its message, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
