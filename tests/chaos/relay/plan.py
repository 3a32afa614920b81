"""What is done to the relay, drawn from a seed. Pure: the same seed gives the same rounds."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from tests.chaos.common.plan import event_of_round, generator_of_round


class Blow(StrEnum):
    KILL_LEADER = "kill the leader"
    KILL_STANDBY = "kill a standby"
    KILL_ALL = "kill every relay"
    STOP_LEADER = "stop the leader"
    FREEZE_LEADER = "freeze the leader until another leads"
    FREEZE_LEADER_BRIEFLY = "freeze the leader briefly"
    RESTART_BROKER = "restart the broker"
    KILL_BROKER = "kill the broker"
    STEP_DOWN = "step down the primary"
    ROLL_OPLOG_UNDER_FROZEN = "roll the oplog under frozen relays"
    ROLL_OPLOG_UNDER_DEAD = "roll the oplog under dead relays"
    RESET_POSITION = "reset the position"
    RESET_POSITION_UNDER_DEAD = "reset the position of dead relays"


SECOND_BLOWS = (Blow.KILL_LEADER, Blow.STOP_LEADER, Blow.RESET_POSITION)


@dataclass(frozen=True, slots=True)
class Strike:
    """after_events: how many events are settled between the last strike, or the load, and this."""

    blow: Blow
    after_events: int
    hold_seconds: float


@dataclass(frozen=True, slots=True)
class Round:
    """burst_count: events that are inserted at once, beside what the writers commit."""

    number: int
    burst_count: int
    strikes: Sequence[Strike]

    def __str__(self) -> str:
        return ", ".join(f"{strike.blow} (at {strike.after_events})" for strike in self.strikes)


def draw_plan(
    seed: int, round_count: int, *, first: int = 1, blows: Sequence[Blow] = tuple(Blow)
) -> list[Round]:
    """
    Every blow falls once in each len(blows) rounds, in an order of the seed's own.

    A round depends on nothing but the seed and its number, so it can be repeated alone.
    """
    return [_draw_round(seed, first + index, blows) for index in range(round_count)]


def _draw_round(seed: int, number: int, blows: Sequence[Blow]) -> Round:
    draw = generator_of_round(str(seed), number)
    burst_count = draw.randint(200, 1500)
    struck = [
        event_of_round(str(seed), number, blows),
        *([draw.choice(SECOND_BLOWS)] if draw.random() < 1 / 3 else []),
    ]
    strikes = [
        Strike(blow, draw.randint(1, burst_count), round(draw.uniform(0.1, 1.5), 2))
        for blow in struck
    ]
    return Round(number, burst_count, strikes)
