"""What is done to the consumers, drawn from a seed. Pure: the same seed gives the same rounds."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from tests.chaos.common.plan import event_of_round, generator_of_round


class Point(StrEnum):
    """Where a worker dies, in the order in which a message comes by."""

    RECEIVED = "received"
    CLAIMED = "claimed"
    CALLING = "calling"
    CALLED = "called"
    RECORDING = "recording"
    RECORDED = "recorded"
    ACKNOWLEDGED = "acknowledged"


class Blow(StrEnum):
    RESTART_BROKER = "restart the broker"
    KILL_BROKER = "kill the broker"
    WIPE_BROKER = "wipe the broker's disk"
    RESTART_MONGODB = "restart MongoDB"
    KILL_MONGODB = "kill MongoDB"
    KILL_RELAY = "kill the relay"
    KILL_RECONCILER = "kill the reconciler"
    KILL_DEAD_LETTERS = "kill the dead-letter consumer"
    STOP_WORKERS = "stop the workers"
    FREEZE_WORKERS = "freeze the workers beyond their leases"


#: After these a lease may end with its worker alive, and the call is made again.
OUTLASTS_LEASES = frozenset({Blow.RESTART_MONGODB, Blow.KILL_MONGODB, Blow.FREEZE_WORKERS})

WORKERS = ("slack", "email")

#: By kind of third party: ways to misbehave for a few calls, with their options.
MISBEHAVIOURS: dict[str, Sequence[tuple[str, dict[str, object]]]] = {
    "slack": [
        ("status", {"code": 503}),
        ("hang", {}),
        ("reset", {}),
        ("accept_then_fail", {}),
        ("ok_false", {}),
    ],
    "email": [("status", {"code": 451}), ("hang", {}), ("reset", {}), ("accept_then_fail", {})],
}


@dataclass(frozen=True, slots=True)
class Order:
    """
    To die when the point is reached for the nth time since.

    wait_seconds: how long a call goes on before its worker dies; of `CALLING` only.
    request_id: counts what is reached for this request only.
    """

    worker: str
    point: Point
    nth: int = 1
    wait_seconds: float = 0.0
    request_id: str = ""

    def __str__(self) -> str:
        return f"{self.worker} dies {self.point} ({self.nth})"


@dataclass(frozen=True, slots=True)
class Misbehaviour:
    """times: the number of calls that it lasts for."""

    kind: str
    mode: str
    options: dict[str, object]
    times: int

    def __str__(self) -> str:
        return f"{self.kind}: {self.mode} ({self.times})"


@dataclass(frozen=True, slots=True)
class Round:
    """requests_count: at the least; they go on until every blow has fallen."""

    number: int
    requests_count: int
    orders: Sequence[Order]
    blow: Blow | None = None
    misbehaviour: Misbehaviour | None = None

    def __str__(self) -> str:
        return ", ".join(str(part) for part in (self.blow, *self.orders, self.misbehaviour) if part)


def draw_plan(seed: int, round_count: int, *, first: int = 1) -> list[Round]:
    """
    Every point and every blow comes once in each 17 rounds, in an order of the seed's own.

    A round depends on nothing but the seed and its number, so it can be repeated alone.
    """
    return [_draw_round(seed, first + index) for index in range(round_count)]


def _draw_round(seed: int, number: int) -> Round:
    own_seed = f"{seed}/delivery"
    events: list[Point | Blow] = [*Point, *Blow]
    due = event_of_round(own_seed, number, events)
    draw = generator_of_round(own_seed, number)
    points = [due] if isinstance(due, Point) else []
    points += draw.choices(list(Point), k=draw.randint(0, 2))
    return Round(
        number,
        draw.randint(15, 60),
        [
            Order(draw.choice(WORKERS), point, draw.randint(1, 8), round(draw.uniform(0, 0.03), 3))
            for point in points
        ],
        due if isinstance(due, Blow) else None,
        _draw_misbehaviour(draw) if draw.random() < 1 / 3 else None,
    )


def _draw_misbehaviour(draw: random.Random) -> Misbehaviour:
    kind = draw.choice(list(MISBEHAVIOURS))
    mode, options = draw.choice(MISBEHAVIOURS[kind])
    return Misbehaviour(kind, mode, options, draw.randint(1, 4))
