"""
Updates of one delivery inside its request, as aggregation pipelines.

Each update recomputes `next_due_at` on the server, from the current state of all deliveries. In the
expressions, `$$delivery` is the delivery that is changed. Data must go through `given`: otherwise
text that begins with a dollar sign would be read as an expression.

https://www.mongodb.com/docs/manual/tutorial/update-documents-with-aggregation-pipeline/
"""

from collections.abc import Mapping
from math import ceil
from typing import Any

from assistance.delivery import ACTIVE_STATES

NOW = "$$NOW"

_IS_ACTIVE = {"$in": ["$$delivery.state", {"$literal": list(ACTIVE_STATES)}]}

#: Due and not leased, by the server's clock.
CLAIMABLE: tuple[Any, ...] = (
    _IS_ACTIVE,
    {"$lte": ["$$delivery.due_at", NOW]},
    {"$lte": [{"$ifNull": ["$$delivery.lease_until", "$$delivery.due_at"]}, NOW]},
)


def given(value: Any) -> dict[str, Any]:
    return {"$literal": value}


def from_now(seconds: float) -> dict[str, Any]:
    """
    A time by the server's clock. A date holds whole milliseconds: a part of one is rounded up, so
    that no wait and no lease ends early.
    """
    return {"$add": [NOW, ceil(round(seconds * 1000, 3))]}


def some_delivery(destination: str, *conditions: Any) -> dict[str, Any]:
    """Whether the delivery to this destination meets the conditions; goes under `$expr`."""
    same = {"$eq": ["$$delivery.destination", given(destination)]}
    return {"$anyElementTrue": [_each_delivery({"$and": [same, *conditions]})]}


def change(
    destination: str,
    delivery_fields: Mapping[str, Any],
    request_fields: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """An update of one delivery, and of its request. Both mappings: field -> expression."""
    changed = {
        "$cond": [
            {"$eq": ["$$delivery.destination", given(destination)]},
            {"$mergeObjects": ["$$delivery", dict(delivery_fields)]},
            "$$delivery",
        ]
    }
    return [
        {"$set": {"deliveries": _each_delivery(changed), **(request_fields or {})}},
        {"$set": {"next_due_at": _next_due_at()}},
    ]


def _next_due_at() -> dict[str, Any]:
    """`assistance.request.next_due_at` as an expression; null when no delivery is active."""
    # $max and $min skip null; $min is null when there is nothing else
    look = {"$max": ["$$delivery.due_at", "$$delivery.lease_until", "$$delivery.hint_until"]}
    return {"$min": _each_delivery({"$cond": [_IS_ACTIVE, look, None]})}


def _each_delivery(expression: Any) -> dict[str, Any]:
    return {"$map": {"input": "$deliveries", "as": "delivery", "in": expression}}
