"""
How a process is stopped: SIGTERM or Ctrl-C once to drain, twice to exit at once.

A stop ends within the grace time whatever hangs: a driver's thread that waits for a silent server
cannot be cancelled, and Python would wait for it before it exits.
"""

import asyncio
import os
import signal
import threading
from contextlib import suppress

from loguru import logger

from runtime.exit_codes import ExitCode

#: For a process whose settings name no grace time.
DEFAULT_GRACE_SECONDS = 10.0

#: What closing the connections may take after the grace time, before the process is ended.
CLOSING_SECONDS = 4.0

#: How long the last line of the log may take.
LAST_WORDS_SECONDS = 0.5


class Stop:
    """
    A request to stop, visible to every task of a process.

    >>> while not stop.requested:
    ...     await stop.rest(await work_once())
    """

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self._requested = threading.Event()

    @property
    def requested(self) -> bool:
        return self._event.is_set()

    def request(self) -> None:
        self._event.set()
        self._requested.set()

    async def wait(self) -> None:
        await self._event.wait()

    async def rest(self, seconds: float) -> None:
        """Wait this long, or until a stop is requested."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._event.wait(), seconds)

    def on_signals(self, *, grace_seconds: float = DEFAULT_GRACE_SECONDS) -> None:
        """
        Request a stop on SIGTERM and SIGINT. Call once, inside the running loop.

        grace_seconds: once a stop is requested, by a signal or otherwise, the process is gone this
        long plus `CLOSING_SECONDS` later.
        """
        loop = asyncio.get_running_loop()

        def signalled(*_: object) -> None:
            if self._requested.is_set():
                os._exit(ExitCode.INTERRUPTED)
            # at once, for the thread below: a loop that hangs never comes to it
            self._requested.set()
            loop.call_soon_threadsafe(self.request)

        for number in (signal.SIGTERM, signal.SIGINT):
            # not the loop's own handler, which runs only when the loop does
            signal.signal(number, signalled)
        # started now: at the end there may be no thread left to be had
        threading.Thread(
            target=self._end_in_time,
            args=[grace_seconds + CLOSING_SECONDS],
            name="end in time",
            daemon=True,
        ).start()

    def _end_in_time(self, seconds: float) -> None:
        self._requested.wait()
        # never set: the process ends before, and this thread with it
        threading.Event().wait(seconds)
        # a log that nobody reads may be what hangs
        with suppress(RuntimeError):
            logging = threading.Thread(target=_log_forced, args=[seconds], daemon=True)
            logging.start()
            logging.join(LAST_WORDS_SECONDS)
        os._exit(ExitCode.UNFINISHED)


def _log_forced(seconds: float) -> None:
    logger.error("stop.forced", after_seconds=seconds, exit_code=ExitCode.UNFINISHED)
