"""The relay campaign's plan is repeatable, and its verdict names every kind of fault."""

import pytest

from tests.chaos.relay.plan import Blow, draw_plan
from tests.chaos.relay.verdict import Committed, Evidence, decide


def test_a_seed_plans_the_same_rounds_and_each_blow_in_turn() -> None:
    plan = draw_plan(7, 2 * len(Blow))
    assert plan == draw_plan(7, 2 * len(Blow))
    assert plan[5:6] == draw_plan(7, 1, first=6)
    assert plan != draw_plan(8, 2 * len(Blow))
    assert {round_.strikes[0].blow for round_ in plan[: len(Blow)]} == set(Blow)


COMMITTED = {"a1": Committed("a", 1), "a2": Committed("a", 2), "b1": Committed("b", 1)}


@pytest.mark.parametrize(
    ("copies", "fault"),
    [
        (["a1", "b1"], "1 committed and never published: a2"),
        (["a1", "a2", "b1", "aborted"], "1 published and never committed: aborted"),
        (["a2", "a1", "b1"], "1 out of order: a: 1 after 2"),
        (["a1", "a1", "a1", "a1", "a2", "b1"], "3 repeats in 1 terms of leadership"),
    ],
)
def test_the_verdict_names_what_went_wrong(copies: list[str], fault: str) -> None:
    evidence = Evidence(COMMITTED, copies, {"older"}, {"b": 0}, terms=1, window=2)
    (found,) = decide(evidence).faults
    assert found.startswith(fault)


def test_repeats_within_the_window_are_no_fault() -> None:
    copies = ["a1", "older", "b1", "a1", "a2"]
    verdict = decide(Evidence(COMMITTED, copies, {"older"}, {"a": 0}, terms=1, window=2))
    assert (verdict.faults, verdict.repeats) == ([], 2)
    assert verdict.last_seqs == {"a": 2, "b": 1}
