"""A dead letter's identity and its size limits."""

from typing import Any

from assistance.dead_letter import BODY_LIMIT_BYTES
from consumers.maintenance.dead_letter_consumer import read_letter
from runtime.rabbit import AmqpMessage


def letter_of(body: bytes, message_id: str | None = "m", **headers: Any) -> Any:
    message = AmqpMessage(
        delivery_tag=1,
        redelivered=False,
        exchange="dead-letters",
        routing_key="delivery_due.slack",
        message_id=message_id,
        headers={name.replace("_", "-"): value for name, value in headers.items()},
        body=body,
    )
    return read_letter(message).sighting


def test_the_same_message_from_the_same_queue_is_one_letter() -> None:
    from_slack = {"x_first_death_queue": "deliveries.slack"}
    assert letter_of(b"x", **from_slack).id == letter_of(b"x", **from_slack).id
    others = [
        letter_of(b"y", **from_slack),
        letter_of(b"x", message_id="n", **from_slack),
        letter_of(b"x", message_id=None, **from_slack),
        letter_of(b"x", x_first_death_queue="deliveries.email"),
        letter_of(b"x"),
    ]
    assert len({letter.id for letter in others} | {letter_of(b"x", **from_slack).id}) == 6


def test_a_body_beyond_all_reason_is_cut() -> None:
    letter = letter_of(b"x" * 10_000_000)
    assert len(letter.fields["body"]) == BODY_LIMIT_BYTES
    assert letter.fields["body_bytes"] == 10_000_000
