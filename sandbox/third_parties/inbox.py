"""What the third parties were sent, newest first, with counts that outlive what is kept."""

from collections import Counter, deque
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import Any, Literal, get_args

Kind = Literal["slack", "email", "webhook"]
KINDS: tuple[Kind, ...] = get_args(Kind)

KEPT_RECEIPTS = 10_000
REMEMBERED_DELIVERIES = 1_000_000


@dataclass(frozen=True)
class Call:
    """One call as it arrived, before the answer is chosen."""

    kind: Kind
    destination: str
    request_id: str | None
    idempotency_key: str | None
    content: dict[str, Any]


@dataclass(frozen=True)
class Receipt:
    """
    A call and what became of it.

    `accepted` says that the message was kept, even where the caller never heard of it.
    `repeat` says that this request id had been accepted for this destination before.
    """

    number: int
    received_at: datetime
    call: Call
    accepted: bool
    repeat: bool
    answer: str

    def as_json(self) -> dict[str, Any]:
        return {
            "number": self.number,
            "received_at": self.received_at.isoformat(timespec="milliseconds"),
            "kind": self.call.kind,
            "destination": self.call.destination,
            "request_id": self.call.request_id,
            "idempotency_key": self.call.idempotency_key,
            "accepted": self.accepted,
            "repeat": self.repeat,
            "answer": self.answer,
            **self.call.content,
        }


class Inbox:
    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._receipts: deque[Receipt] = deque(maxlen=KEPT_RECEIPTS)
        self._counts: Counter[tuple[Kind, str]] = Counter()
        self._delivered: dict[tuple[Kind, str, str], None] = {}
        self._last_number = 0

    def keep(self, call: Call, *, accepted: bool, answer: str) -> Receipt:
        repeat = accepted and not self._is_first_delivery(call)
        self._last_number += 1
        receipt = Receipt(
            self._last_number, datetime.now(UTC), call, accepted, repeat=repeat, answer=answer
        )
        self._receipts.appendleft(receipt)
        self._count(receipt)
        return receipt

    def newest(
        self,
        *,
        limit: int,
        kind: Kind | None = None,
        request_id: str | None = None,
        accepted: bool | None = None,
    ) -> list[Receipt]:
        matching = (
            receipt
            for receipt in self._receipts
            if kind in (None, receipt.call.kind)
            and request_id in (None, receipt.call.request_id)
            and accepted in (None, receipt.accepted)
        )
        return list(islice(matching, limit))

    def totals(self) -> dict[Kind, dict[str, int]]:
        """Count each kind: received = distinct + repeated; refused were not kept by the party."""
        return {
            kind: {
                name: self._counts[kind, name]
                for name in ("received", "distinct", "repeated", "refused")
            }
            for kind in KINDS
        }

    def _count(self, receipt: Receipt) -> None:
        kind = receipt.call.kind
        if not receipt.accepted:
            self._counts[kind, "refused"] += 1
            return
        self._counts[kind, "received"] += 1
        self._counts[kind, "repeated" if receipt.repeat else "distinct"] += 1

    def _is_first_delivery(self, call: Call) -> bool:
        """Remember the delivery; without a request id, each counts as the first."""
        if call.request_id is None:
            return True
        delivery = (call.kind, call.destination, call.request_id)
        if delivery in self._delivered:
            return False
        self._delivered[delivery] = None
        if len(self._delivered) > REMEMBERED_DELIVERIES:
            del self._delivered[next(iter(self._delivered))]
        return True
