"""A long-running process: stopped by signals, ended when the machine gives it nothing any more."""

import asyncio
import errno
import os
import resource
import socket
import sys
import threading
from collections.abc import Callable, Coroutine
from time import monotonic
from typing import Any

from loguru import logger

from runtime.exit_codes import ExitCode
from runtime.shutdown import Stop

#: How often the process tries whether it would still be given what it may need.
PROBE_SECONDS = 1.0

#: How often the log repeats that it is not.
REPEAT_SECONDS = 5.0

#: How long it may last before the process ends.
PATIENCE_SECONDS = 10.0

EXHAUSTED_ERRNOS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})


def run_process(life: Callable[[Stop], Coroutine[Any, Any, None]], *, grace_seconds: float) -> None:
    """
    Run until `life` ends, by itself or after SIGTERM or Ctrl-C; what it raises is raised.

    grace_seconds: how long a stop may take; see `Stop.on_signals`.

    Exits with ExitCode.EXHAUSTED when there are no file descriptors, threads or memory to be had.
    """
    exhaustion = Exhaustion()

    async def until_stopped() -> None:
        stop = Stop()
        stop.on_signals(grace_seconds=grace_seconds)
        watching = asyncio.create_task(exhaustion.watch(stop))
        try:
            await life(stop)
        finally:
            stop.request()
            watching.cancel()

    try:
        asyncio.run(until_stopped())
    except (OSError, RuntimeError, MemoryError) as error:
        reason = why_exhausted(error)
        if reason is None:
            raise
        exhaustion.give_up(reason)
    if exhaustion.is_final:
        sys.exit(ExitCode.EXHAUSTED)


class Exhaustion:
    """is_final: it has lasted too long, or ended the process."""

    def __init__(self) -> None:
        self.is_final = False

    async def watch(self, stop: Stop) -> None:
        """Log once what has run out, repeat it slowly, and request a stop when it lasts."""
        since: float | None = None
        logged_at = 0.0
        while True:
            reason = probe()
            now = monotonic()
            if reason is None:
                since = None
            elif since is None or now - logged_at > REPEAT_SECONDS:
                since = since or now
                logged_at = now
                logger.error("process.exhausted", reason=reason, exits_after=PATIENCE_SECONDS)
            if since is not None and now - since > PATIENCE_SECONDS:
                self.give_up(reason or "")
                stop.request()
                return
            await asyncio.sleep(PROBE_SECONDS)

    def give_up(self, reason: str) -> None:
        if not self.is_final:
            logger.error("process.gives_up", reason=reason, exit_code=ExitCode.EXHAUSTED)
        self.is_final = True


def probe() -> str | None:
    """What the system does not give, in words; None while it gives everything."""
    try:
        socket.socket().close()
        thread = threading.Thread(target=os.getpid)
        thread.start()
        thread.join()
    except (OSError, RuntimeError, MemoryError) as error:
        return why_exhausted(error)
    return None


def why_exhausted(error: BaseException) -> str | None:
    """In words, with the remedy; None for an error that is about something else."""
    if isinstance(error, MemoryError):
        return "no memory is left: raise the memory limit"
    if isinstance(error, RuntimeError):
        if "can't start new thread" not in str(error):
            return None
        return "no more threads can be started: raise the limit on processes (ulimit -u, pids.max)"
    if not isinstance(error, OSError) or error.errno not in EXHAUSTED_ERRNOS:
        return None
    if error.errno == errno.EMFILE:
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return f"all {limit} file descriptors are in use: raise the limit (ulimit -n, LimitNOFILE)"
    return f"{os.strerror(error.errno or 0)}: the machine is short of it"
