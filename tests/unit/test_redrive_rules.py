"""When a redrive pauses: the newest outcomes decide."""

from hypothesis import given
from hypothesis import strategies as st

from assistance.redrive import ItemState, failures_return

OUTCOMES = st.lists(st.sampled_from([ItemState.SUCCEEDED, ItemState.FAILED_AGAIN]), max_size=60)


@given(OUTCOMES, st.floats(0.05, 1.0))
def test_a_redrive_judges_by_the_newest_outcomes_only(
    outcomes: list[ItemState], share: float
) -> None:
    newest = outcomes[-20:]
    failed = newest.count(ItemState.FAILED_AGAIN)
    enough = len(newest) >= 10
    assert failures_return(outcomes, share=share) == (enough and failed >= share * len(newest))
