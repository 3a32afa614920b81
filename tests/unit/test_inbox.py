"""The sandbox's inbox counts receipts that it no longer keeps."""

from sandbox.third_parties.inbox import KEPT_RECEIPTS, Call, Inbox


def test_counts_and_repeats_outlive_the_receipts_that_made_room() -> None:
    inbox = Inbox()
    for number in [*range(KEPT_RECEIPTS + 500), 0]:
        call = Call("slack", "T000/B000", f"r-{number}", idempotency_key=None, content={})
        inbox.keep(call, accepted=True, answer="200 ok")

    kept = inbox.newest(limit=KEPT_RECEIPTS + 1)
    assert len(kept) == KEPT_RECEIPTS
    assert (kept[0].number, kept[0].repeat) == (KEPT_RECEIPTS + 501, True)
    assert inbox.totals()["slack"] == {
        "received": KEPT_RECEIPTS + 501,
        "distinct": KEPT_RECEIPTS + 500,
        "repeated": 1,
        "refused": 0,
    }
