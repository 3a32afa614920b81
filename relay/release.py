"""Letting held events go: when their routing key may, or when an operator asks for it."""

from collections.abc import Callable, Mapping
from time import monotonic
from typing import Any

from loguru import logger

from outbox.errors import UnfitEvent
from outbox.event import read_event
from outbox.state import State
from relay import operations
from relay.held import HeldKeys
from relay.marks import Marks
from relay.publisher import Publisher
from relay.report import Report
from relay.window import Entry, Window
from runtime.mongo import CommitUnknown, Database

WISH_POLL_SECONDS = 1.0


class Release:
    """A key's events leave one at a time, the next when the last one's fate is written."""

    def __init__(
        self,
        database: Database,
        group: str,
        *,
        held: HeldKeys,
        window: Window,
        publisher: Publisher,
        marks: Marks,
        report: Report,
    ) -> None:
        assert report.leadership is not None
        self._database = database
        self._group = group
        self._epoch = report.leadership.checkpoint.epoch
        self._held = held
        self._window = window
        self._publisher = publisher
        self._marks = marks
        self._report = report
        self._wishes_due_at = monotonic()

    async def run_once(self, goes_on: Callable[[], bool]) -> None:
        """Try the first event of each key that may go, and do what operators asked for."""
        for key in self._held.due(self._publisher.may_go):
            if not goes_on() or not self._window.may_send:
                return
            await self._let_go(key)
        if monotonic() >= self._wishes_due_at:
            self._wishes_due_at = monotonic() + WISH_POLL_SECONDS
            await self._carry_out_wishes()

    async def _let_go(self, key: str) -> None:
        if self._window.has_unwritten(key):
            return
        held = self._held.keys[key]
        noted = held.noted
        document = await self._held.first_of(key)
        if document is None:
            # more of it may have been held, and written, while MongoDB was asked
            if held.noted == noted and self._window.free(key):
                del self._held.keys[key]
            return
        if document["state"] == State.PARKED:
            self._held.postpone(key)
            return
        try:
            event = read_event(document)
        except (UnfitEvent, ValueError) as unfit:
            # a parked one that was released, or one that somebody has changed: a person has to look
            await self._marks.park(document["_id"], str(unfit))
            self._report.parked_later()
            logger.error("event.parked", event_id=str(document["_id"]), key=key, reason=str(unfit))
            return
        if not self._publisher.may_go(event.routing_key):
            self._held.keys[key].routing_key = event.routing_key
            return
        self._held.let_go(key, event.routing_key)
        self._publisher.dispatch(
            Entry(event.id, key, document["ordinal"], event, position=None, in_order=False)
        )

    async def _carry_out_wishes(self) -> None:
        for wish in await operations.open_wishes(self._database, self._group):
            result = await self._carry_out(wish)
            if result is None:
                continue  # on its way at this moment; the next look tells
            try:
                await operations.note_carried_out(
                    self._database, self._group, wish["_id"], result, epoch=self._epoch
                )
            except CommitUnknown:
                continue  # noted or still open; the next look tells
            logger.warning(
                "wish.carried_out",
                wish=wish["what"],
                event_id=str(wish["event_id"]),
                result=result,
                who=wish["who"],
                why=wish["why"],
            )

    async def _carry_out(self, wish: Mapping[str, Any]) -> str | None:
        event_id = wish["event_id"]
        waiting = await self._held.find(event_id)
        if waiting is None:
            return "neither held nor parked any more"
        key = waiting["held_key"]
        if key not in self._held.keys or self._held.keys[key].going:
            return None
        self._held.look_now(key)
        if wish["what"] == operations.Wish.DISCARD:
            return "discarded" if await self._marks.discard(event_id) else None
        self._publisher.forgive(waiting.get("routing_key"))
        return "released" if await self._marks.release(event_id) else None
