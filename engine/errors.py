"""Errors that are shown to the user in one line."""


class UserError(ValueError):
    """Invalid input. The message is one line: what was expected, what was given, what to do.

    The command line prints it and exits with code 2. It takes one plain argument, so it can be pickled.
    """


class SearchFailed(RuntimeError):
    """The search cannot continue because of the model or the data (exit code 1)."""


class NotFinite(SearchFailed):
    """The model produced NaN or infinity and cannot be scored (exit code 1)."""


class RecoveryFailed(SearchFailed):
    """The training cannot continue (exit code 1)."""


class DeviceMemoryError(SearchFailed):
    """A device ran out of memory. Smaller calls may fit; the caller decides."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
