"""The cause of an error of a library, in words of the operating system, which hold no secret."""

import os
import socket


def causes_of(error: BaseException | None) -> list[BaseException]:
    """The error and those that it came from, innermost last."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def system_reason(error: BaseException) -> str:
    """Such as `Connection refused`; empty when the operating system gave no reason."""
    for cause in reversed(causes_of(error)):
        if isinstance(cause, socket.gaierror):
            return cause.strerror or ""
        if isinstance(cause, OSError) and cause.errno:
            return os.strerror(cause.errno)
    return ""
