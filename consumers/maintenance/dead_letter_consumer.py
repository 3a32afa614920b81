"""
The dead-letter consumer: stores every dead-lettered message, with its origin and reason.

A letter is acknowledged only once it is stored. It never fails a request: a crashing worker pushes
messages over the delivery limit that were never tried. A letter of an open delivery returns the
delivery to the reconciler.
"""

from dataclasses import dataclass

from loguru import logger
from prometheus_client import Counter

from assistance.collection import DEAD_LETTERS
from assistance.dead_letter import Decision, Sighting, from_message
from assistance.events import read_hint
from consumers.database import open_database
from consumers.delivery.hints import Hints
from consumers.delivery.subscriber import Subscriber, Subscription
from consumers.delivery.updates import NOW, given
from consumers.maintenance.metrics import letters_stored
from consumers.settings import DeadLetterSettings
from consumers.topology import DEAD_LETTERS_QUEUE, declare_dead_letters
from outbox.errors import UndecodableBody
from runtime.mongo import Database, retry_while_unavailable
from runtime.monitoring import monitored
from runtime.rabbit import AmqpChannel, AmqpMessage
from runtime.shutdown import Stop

CONCURRENCY = 8


@dataclass(frozen=True, slots=True)
class ReadLetter:
    """
    hint: event id, request id and destination, if it is a hint.
    problem: why it is not a hint, or why its properties cannot be decoded.
    """

    sighting: Sighting
    hint: tuple[str, str, str] | None
    problem: str


def read_letter(message: AmqpMessage) -> ReadLetter:
    try:
        hint, problem = read_hint(message.body), message.undecodable or ""
    except UndecodableBody as error:
        hint, problem = None, str(error)
    sighting = from_message(
        queue=_first_death(message, "queue"),
        reason=_first_death(message, "reason"),
        exchange=_first_death(message, "exchange"),
        routing_key=_text(message.routing_key),
        message_id=None if message.message_id is None else _text(message.message_id),
        body=message.body,
        problem=problem,
        request_id=hint[1] if hint else None,
        destination=hint[2] if hint else None,
    )
    return ReadLetter(sighting, hint, problem)


class DeadLetters:
    """stored: counted by `decision`."""

    def __init__(self, database: Database, stored: Counter) -> None:
        self._stored = stored
        self._letters = database[DEAD_LETTERS]
        self._hints = Hints(database)

    async def handle(self, message: AmqpMessage, channel: AmqpChannel) -> None:
        letter = read_letter(message)
        decision = await retry_while_unavailable(lambda: self._decide(letter))
        await retry_while_unavailable(lambda: self._store(letter, decision))
        channel.ack(message)
        self._stored.labels(decision.value).inc()
        logger.warning(
            "letter.stored",
            letter_id=letter.sighting.id,
            event_id=letter.sighting.fields["message_id"],
            request_id=letter.sighting.fields["request_id"],
            destination=letter.sighting.fields["destination"],
            queue=letter.sighting.fields["queue"],
            reason=letter.sighting.fields["reason"],
            problem=letter.problem,
            decision=decision.value,
        )

    async def _decide(self, letter: ReadLetter) -> Decision:
        if letter.hint is None:
            return Decision.PARKED
        event_id, request_id, destination = letter.hint
        if await self._hints.requeue(request_id, destination, event_id):
            return Decision.REQUEUED
        return Decision.IGNORED

    async def _store(self, letter: ReadLetter, decision: Decision) -> None:
        """A letter comes again if its acknowledgement was lost; an operator's discard stays."""
        discarded = {"$eq": ["$decision", Decision.DISCARDED.value]}
        stored = {
            **{name: given(value) for name, value in letter.sighting.fields.items()},
            "decision": {"$cond": [discarded, "$decision", decision.value]},
            "first_seen_at": {"$ifNull": ["$first_seen_at", NOW]},
            "last_seen_at": NOW,
            "count": {"$add": [{"$ifNull": ["$count", 0]}, 1]},
        }
        await self._letters.update_one({"_id": letter.sighting.id}, [{"$set": stored}], upsert=True)


def _first_death(message: AmqpMessage, what: str) -> str:
    """https://www.rabbitmq.com/docs/dlx#effects ; `unknown` when the broker does not say."""
    value = message.headers.get(f"x-first-death-{what}")
    return _text(value) if isinstance(value, str | bytes) else "unknown"


def _text(value: str | bytes) -> str:
    """The driver leaves a property that is not UTF-8 as bytes, despite its annotation."""
    return value if isinstance(value, str) else value.decode("utf-8", "backslashreplace")


async def run_dead_letters(settings: DeadLetterSettings, stop: Stop) -> None:
    """Raises UnsuitableServer or BrokerRefused when MongoDB or RabbitMQ refuses it at the start."""
    async with (
        monitored(settings, "dead-letters") as monitor,
        open_database(settings, "dead-letters", stop, monitor) as database,
    ):
        stored = letters_stored(monitor.registry)
        subscription = Subscription(
            name="dead-letters",
            queue=DEAD_LETTERS_QUEUE,
            concurrency=CONCURRENCY,
            grace_seconds=settings.shutdown_grace_seconds,
            declare=declare_dead_letters,
            handle=DeadLetters(database, stored).handle,
        )
        subscriber = Subscriber(settings, subscription, stop)
        monitor.ready_when(lambda: subscriber.why_not_ready)
        await subscriber.run()
