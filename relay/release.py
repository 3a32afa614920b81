"""Releases held events: when their routing key has recovered, or when an operator requests it."""

from collections.abc import Callable, Mapping
from time import monotonic
from typing import Any

from loguru import logger

from outbox.errors import UnfitEvent
from outbox.event import read_event
from outbox.state import State
from relay import operations
from relay.checkpoint import Checkpoint
from relay.held import HeldKeys
from relay.marks import Marks
from relay.publisher import Publisher
from relay.report import Report
from relay.window import ALONE, Entry, Window
from runtime.mongo import CommitUnknown, Database

REQUEST_POLL_SECONDS = 1.0


class Release:
    """Releases events of one key one at a time: the next once the last one's fate is saved."""

    def __init__(
        self,
        database: Database,
        checkpoint: Checkpoint,
        *,
        held: HeldKeys,
        window: Window,
        publisher: Publisher,
        marks: Marks,
        report: Report,
    ) -> None:
        self._database = database
        self._checkpoint = checkpoint
        self._held = held
        self._window = window
        self._publisher = publisher
        self._marks = marks
        self._report = report
        self._requests_due_at = monotonic()

    async def run_once(self, goes_on: Callable[[], bool]) -> None:
        """Release the first event of each key that is due, and execute operator requests."""
        for key in self._held.due(self._publisher.may_go):
            if not goes_on() or not self._window.may_send:
                return
            await self._release_first(key)
        if monotonic() >= self._requests_due_at:
            self._requests_due_at = monotonic() + REQUEST_POLL_SECONDS
            await self._execute_requests()

    async def _release_first(self, key: str) -> None:
        if self._window.has_unwritten(key):
            return
        held = self._held.keys[key]
        noted = held.noted
        document = await self._held.first_of(key)
        if document is None:
            # another event of the key may have been held, and written, during the query
            if held.noted == noted and self._window.free(key):
                del self._held.keys[key]
            return
        if document["state"] == State.PARKED:
            self._held.postpone(key)
            return
        try:
            event = read_event(document)
        except (UnfitEvent, ValueError) as unfit:
            # a parked event was released without a correction, or a document was changed: park it
            if not await self._marks.park(document["_id"], str(unfit)):
                return
            self._report.parked_later()
            logger.error("event.parked", event_id=str(document["_id"]), key=key, reason=str(unfit))
            return
        if not self._publisher.may_go(event.routing_key):
            self._held.keys[key].routing_key = event.routing_key
            return
        self._held.mark_in_flight(key, event.routing_key)
        entry = Entry(event.id, key, document["ordinal"], event, position=None, in_order=False)
        if str(document.get("reason")).startswith(ALONE):
            self._publisher.dispatch_alone(entry)
        else:
            self._publisher.dispatch(entry)

    async def _execute_requests(self) -> None:
        for request in await operations.open_requests(self._database, self._checkpoint.group):
            result = await self._execute(request)
            if result is None:
                continue  # in flight now; decided at a later poll
            try:
                await operations.record_result(
                    self._database,
                    self._checkpoint.group,
                    request["_id"],
                    result,
                    epoch=self._checkpoint.epoch,
                )
            except CommitUnknown:
                continue  # recorded or still open; the next poll shows which
            logger.warning(
                "operator_request.completed",
                request=request["what"],
                event_id=str(request["event_id"]),
                result=result,
                who=request["who"],
                why=request["why"],
            )

    async def _execute(self, request: Mapping[str, Any]) -> str | None:
        event_id = request["event_id"]
        waiting = await self._held.find(event_id)
        if waiting is None:
            return "no longer held or parked"
        key = waiting["held_key"]
        if key not in self._held.keys or self._held.keys[key].in_flight:
            return None
        self._held.make_due(key)
        if request["what"] == operations.RequestKind.DISCARD:
            return "discarded" if await self._marks.discard(event_id) else None
        self._publisher.reset(waiting.get("routing_key"))
        return "released" if await self._marks.release(event_id) else None
