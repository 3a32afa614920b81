"""The delivery campaign's plan is repeatable, and its verdict names every kind of fault."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from assistance.books import Books
from assistance.waiting import Reason
from tests.chaos.delivery.plan import Blow, Point, draw_plan
from tests.chaos.delivery.verdict import Call, Death, Evidence, decide


def test_a_seed_plans_the_same_rounds_with_each_point_and_blow_in_turn() -> None:
    cycle = len(Point) + len(Blow)
    plan = draw_plan(7, cycle)
    assert plan == draw_plan(7, cycle)
    assert plan[5:6] == draw_plan(7, 1, first=6)
    assert plan != draw_plan(8, cycle)
    assert {round_.blow for round_ in plan} == {None, *Blow}
    assert {order.point for round_ in plan for order in round_.orders} == set(Point)


WAY = ("a", "slack")
DONE = {"number": 1, "verdict": "done", "code": "200"}
LOST = {"number": 1, "verdict": "unknown", "code": "worker_lost"}
LATER = {"number": 1, "verdict": "later", "code": "503"}
GOT_IT = Call(WAY, "key", accepted=True)
REFUSED = Call(WAY, "key", accepted=False)


def decide_on(
    calls: Sequence[Call] = (GOT_IT,),
    attempts: Sequence[Mapping[str, Any]] = (DONE,),
    state: str = "succeeded",
    **more: Any,
) -> Sequence[str]:
    delivery = {"state": state, "idempotency_key": "key", "attempts": attempts}
    others: dict[str, Any] = {"books": Books(succeeded=1), "deaths": [], "arrivals": {}, **more}
    return decide(Evidence(deliveries={WAY: delivery}, calls=calls, **others)).faults


@pytest.mark.parametrize(
    "what",
    [
        {},
        {"calls": [REFUSED, GOT_IT], "attempts": [LATER, DONE]},
        {
            "calls": [GOT_IT, GOT_IT],
            "attempts": [LOST, DONE],
            "deaths": [Death("slack", "called", ["a"], ["hint"])],
            "arrivals": {"hint": 2},
        },
        {"calls": [GOT_IT, GOT_IT], "attempts": [LOST, DONE], "leases_may_end": True},
    ],
)
def test_what_is_explained_is_no_fault(what: dict[str, Any]) -> None:
    assert not decide_on(**what)


@pytest.mark.parametrize(
    ("what", "fault"),
    [
        ({"books": Books(failed=1)}, "the books: accepted 1 = succeeded 0 + failed 1"),
        ({"books": Books(waiting=Counter({Reason.DUE: 1}))}, "the books"),
        ({"books": Books(succeeded=1, unexplained=1)}, "the books"),
        ({"state": "failed"}, "1 failed, and nothing was wrong with them: a/slack"),
        ({"calls": []}, "1 succeeded, and the third party never got them: a/slack"),
        ({"calls": [REFUSED]}, "1 succeeded, and the third party never got them"),
        ({"calls": [GOT_IT, GOT_IT]}, "1 called more often than is explained: a/slack/2 calls, 1"),
        (
            {"calls": [GOT_IT, GOT_IT], "attempts": [LOST, DONE]},
            "1 called more often than is explained",
        ),
        (
            {
                "calls": [GOT_IT, GOT_IT],
                "attempts": [LOST, DONE],
                "deaths": [Death("slack", "claimed", [], [])],
            },
            "1 called more often than is explained",
        ),
        (
            {"calls": [Call(WAY, "another", accepted=True)]},
            "1 called under another idempotency key: a/slack",
        ),
        (
            {"calls": [GOT_IT, Call(("b", "slack"), "key", accepted=True)]},
            "1 called, and not in this round's ledger: b/slack",
        ),
        (
            {"deaths": [Death("slack", "called", [], ["hint"])], "arrivals": {"hint": 1}},
            "1 acknowledged before its outcome was recorded",
        ),
    ],
)
def test_the_verdict_names_what_went_wrong(what: dict[str, Any], fault: str) -> None:
    (found,) = decide_on(**what)
    assert found.startswith(fault)
