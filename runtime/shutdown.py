"""How a process is stopped: SIGTERM or Ctrl-C once to drain, twice to exit at once."""

import asyncio
import os
import signal
from contextlib import suppress

#: What a shell reports for a process that died of SIGINT; the operator asked twice.
EXIT_FORCED = 130


class Stop:
    """
    A request to stop, visible to every task of a process.

    >>> while not stop.requested:
    ...     await stop.rest(await work_once())
    """

    def __init__(self) -> None:
        self._event = asyncio.Event()

    @property
    def requested(self) -> bool:
        return self._event.is_set()

    def request(self) -> None:
        self._event.set()

    async def wait(self) -> None:
        await self._event.wait()

    async def rest(self, seconds: float) -> None:
        """Wait this long, or until a stop is requested."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._event.wait(), seconds)

    def on_signals(self) -> None:
        """Call once, inside the running loop."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled)

    def _signalled(self) -> None:
        if self.requested:
            os._exit(EXIT_FORCED)
        self.request()
