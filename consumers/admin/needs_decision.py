"""
Deliveries whose third party did not answer, and whose rule is to ask an operator.

    sent    the third party has the message: closed as succeeded, as if it had answered
    retry   it does not, or a duplicate is acceptable: due at once, with a new hint, the same
            idempotency key and all its attempts again

Each decision is one transaction with its event and its record in `operations`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from assistance import events
from assistance.collection import ASSISTANCES
from assistance.delivery import (
    Delivery,
    DeliveryState,
    hint_patience_seconds,
)
from assistance.request import (
    Request,
    Status,
    closing_facts,
    delivery_to,
    event_context,
    status_after,
)
from consumers.database import server_time
from consumers.delivery.updates import NOW, change, from_now, given
from outbox.collection import OUTBOX
from runtime.mongo import Database, Session, in_transaction
from runtime.operations import NothingToDo, Operator, record_done

UNDECIDED = {"deliveries.state": DeliveryState.NEEDS_DECISION.value}


class NeedsDecision:
    def __init__(self, database: Database) -> None:
        self._database = database
        self._requests = database[ASSISTANCES]

    async def undecided(self, limit: int) -> list[tuple[Request, Delivery]]:
        """Undecided deliveries, oldest request first; the requests without their descriptions."""
        cursor = self._requests.find(
            {"status": Status.ACCEPTED.value, **UNDECIDED},
            {"description": False},
            sort=[("created_at", 1)],
            limit=limit,
        )
        return [
            (request, delivery)
            async for request in cursor
            for delivery in request["deliveries"]
            if delivery["state"] == DeliveryState.NEEDS_DECISION
        ]

    async def sent(self, request_id: str, destination: str, operator: Operator) -> None:
        """Close the delivery as succeeded. Raises NothingToDo."""
        now = await server_time(self._database)

        async def write(session: Session) -> None:
            request = await self._undecided(request_id, destination, session)
            status = status_after(request, destination, DeliveryState.SUCCEEDED)
            facts = closing_facts(request, status, now)
            changed = change(
                destination,
                {"state": given(DeliveryState.SUCCEEDED.value)},
                {
                    "status": given(status.value),
                    "version": given(request["version"] + len(facts)),
                    "updated_at": given(now),
                },
            )
            await self._write(request, changed, facts, session)
            await self._record("unknown_sent", request_id, destination, operator, session)

        await self._in_transaction(write)

    async def retry(self, request_id: str, destination: str, operator: Operator) -> None:
        """Make the delivery due at once. Raises NothingToDo."""
        now = await server_time(self._database)

        async def write(session: Session) -> None:
            request = await self._undecided(request_id, destination, session)
            delivery = delivery_to(request, destination)
            assert delivery is not None
            hint = events.hint(
                event_context(request, now, cause=delivery["hint_event"]),
                destination=destination,
                seq=request["version"] + 1,
            )
            changed = change(
                destination,
                {
                    "state": given(DeliveryState.WAITING.value),
                    "due_at": NOW,
                    "attempts_counted": given(0),
                    "hint_event": given(hint["_id"]),
                    "hints": given(1),
                    "hint_until": from_now(hint_patience_seconds(1)),
                },
                {"version": given(request["version"] + 1), "updated_at": given(now)},
            )
            await self._write(request, changed, [hint], session)
            await self._record("unknown_again", request_id, destination, operator, session)

        await self._in_transaction(write)

    async def _undecided(self, request_id: str, destination: str, session: Session) -> Request:
        request: Request | None = await self._requests.find_one(
            {"_id": request_id}, session=session
        )
        delivery = delivery_to(request, destination) if request else None
        if request is None or delivery is None:
            raise NothingToDo(f"no request {request_id} with a delivery to {destination!r}")
        if delivery["state"] != DeliveryState.NEEDS_DECISION:
            raise NothingToDo(
                f"the delivery of {request_id} to {destination} is {delivery['state']}: "
                "there is nothing to decide; nothing was changed"
            )
        return request

    async def _write(
        self,
        request: Request,
        changed: Sequence[Mapping[str, Any]],
        appended: Sequence[Mapping[str, Any]],
        session: Session,
    ) -> None:
        # read in the same transaction: a concurrent write makes this transaction start again
        await self._requests.update_one({"_id": request["_id"]}, changed, session=session)
        if appended:
            await self._database[OUTBOX].insert_many(appended, session=session)

    async def _record(
        self, what: str, request_id: str, destination: str, operator: Operator, session: Session
    ) -> None:
        await record_done(
            self._database,
            what,
            operator,
            request_id=request_id,
            destination=destination,
            result="done",
            session=session,
        )

    async def _in_transaction(self, write: Any) -> None:
        await in_transaction(self._database.client, write)
