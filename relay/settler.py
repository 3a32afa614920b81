"""
Settles events: those whose fate is decided are marked, then the position is saved behind them.

    window: decided prefix -> marks written -> position saved -> noted
                                 batch n+1 is marked while the position behind batch n is saved
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Protocol

from loguru import logger

from relay.checkpoint import Position
from relay.report import Report
from relay.window import Entry, Window
from runtime.mongo import retry_while_unavailable
from runtime.shutdown import Stop

#: A nearly empty window waits this long for more events before it is marked: single marks would
#: cost both servers and this process more than publishing does, and so add latency.
MARKS_GATHER_SECONDS = 0.05

Batch = Sequence[Entry]


class SavedPosition(Protocol):
    """The part of a Checkpoint that settling needs."""

    settled: int

    async def save(self, *, settled: int, position: Position | None) -> None: ...


class Settler:
    """
    over: no further event will be decided; the settler ends once the last batch is saved.
    mark: writes the marks of a batch; may be repeated.
    on_saved: called in this order with each batch, once the position is saved behind it.
    """

    def __init__(
        self,
        window: Window,
        checkpoint: SavedPosition,
        report: Report,
        over: Stop,
        *,
        mark: Callable[[Batch], Awaitable[None]],
        on_saved: Sequence[Callable[[Batch], None]],
    ) -> None:
        self._window = window
        self._checkpoint = checkpoint
        self._report = report
        self._over = over
        self._mark = mark
        self._on_saved = on_saved
        self._woken = asyncio.Event()
        self._saving: asyncio.Task[None] | None = None

    def wake(self) -> None:
        """Events were decided, a save has ended, or the term is over."""
        self._woken.set()

    async def run(self) -> None:
        """
        Settle until the term is over. Raises what repeating cannot cure, Deposed and GivenUp.

        A write is never left running: the save under way is awaited even after an error.
        """
        try:
            while batch := await self._next_batch():
                with self._report.waiting_for("marking events in MongoDB"):
                    await self._retry("marks", partial(self._mark, batch))
                await self._finish_save()
                self._saving = asyncio.create_task(self._save_behind(batch))
                self._saving.add_done_callback(lambda _: self.wake())
            await self._finish_save()
        finally:
            await asyncio.gather(*filter(None, [self._saving]), return_exceptions=True)

    async def _next_batch(self) -> Batch:
        """The decided prefix; empty once the term is over and every batch was taken."""
        while not self._over.requested:
            await self._woken.wait()
            if self._window.is_nearly_empty:
                await self._over.rest(MARKS_GATHER_SECONDS)
            self._woken.clear()
            if self._saving is not None and self._saving.done():
                self._saving.result()
            if batch := self._window.take_settled():
                return batch
        return self._window.take_settled()

    async def _finish_save(self) -> None:
        if self._saving is not None:
            await self._saving

    async def _save_behind(self, batch: Batch) -> None:
        """The position never passes an event that is not marked."""
        if in_order := [entry for entry in batch if entry.in_order]:
            settled = self._checkpoint.settled + len(in_order)
            position = _last_position(in_order)
            with self._report.waiting_for("saving the position in MongoDB"):
                await self._retry(
                    "position",
                    lambda: self._checkpoint.save(settled=settled, position=position),
                )
        self._window.saved(batch)
        for note in self._on_saved:
            note(batch)

    async def _retry(self, what: str, write: Callable[[], Awaitable[None]]) -> None:
        """Repeat the idempotent write while MongoDB is unavailable. Raises GivenUp at the end."""

        def log_failure(error: Exception) -> None:
            # the error's text would repeat the whole topology
            reason, code = type(error).__name__, getattr(error, "code", None)
            logger.warning("relay.write_failed", what=what, reason=reason, code=code)

        await retry_while_unavailable(
            write, self._over, try_seconds=None, waits_for_rights=False, on_unavailable=log_failure
        )


def _last_position(entries: Batch) -> Position | None:
    """Where the stream stands behind these; None when none of them came from it."""
    return next((entry.position for entry in reversed(entries) if entry.position), None)
