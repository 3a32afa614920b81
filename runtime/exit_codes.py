"""
The exit codes of every command and process, from sysexits.h where it has one.

docs/runbook.md explains them to operators; a unit test compares its table with this one.
"""

from enum import IntEnum


class ExitCode(IntEnum):
    OK = 0
    #: The command worked, and its answer is no: the books do not balance, requests are overdue.
    FOUND = 1
    #: An unknown command, option or name. Typer's own code.
    USAGE = 2
    #: EX_NOINPUT: no such item, or it does not allow this. Nothing was changed.
    NOTHING_DONE = 66
    #: EX_UNAVAILABLE: MongoDB or RabbitMQ cannot be reached.
    UNAVAILABLE = 69
    #: EX_SOFTWARE: a programming error, with a traceback.
    INTERNAL_ERROR = 70
    #: EX_OSERR: the system gives no more file descriptors, threads or memory.
    EXHAUSTED = 71
    #: EX_TEMPFAIL: ended before everything was done, or nothing is known about the end.
    UNFINISHED = 75
    #: EX_NOPERM: a server refuses the user, the password or a right.
    PERMISSION = 77
    #: EX_CONFIG: a setting is wrong, or a server is set up differently.
    CONFIGURATION = 78
    #: What a shell reports for SIGINT: Ctrl-C, or a question that was not answered with yes.
    INTERRUPTED = 130
