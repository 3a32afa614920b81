"""
What the answers of a third party mean: one table per channel, tested row by row over the wire.

Every answer is about the message, about us or about the moment. Which of them depends on when it
came as well as on its code: a mail server that refuses a connection cannot mean the message, which
it has not seen.
"""

from dataclasses import dataclass
from enum import StrEnum

from assistance.verdict import Done, Later, Never, Verdict


class Meaning(StrEnum):
    """
    DELIVERED  the third party has the message
    MESSAGE    it refuses this message: the delivery fails
    US         it refuses us, our configuration or every message: the breaker opens, deliveries wait
    MOMENT     it refuses for now, or is not reachable: the attempt is repeated on schedule
    UNKNOWN    it may have the message
    """

    DELIVERED = "delivered"
    MESSAGE = "about the message"
    US = "about us"
    MOMENT = "about the moment"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Row:
    """
    moment: how far the call had come.
    reason: why the answer has this meaning, where the answer alone does not say so.
    """

    moment: str
    answer: str
    meaning: Meaning
    reason: str = ""


def meaning_of(verdict: Verdict) -> Meaning:
    match verdict:
        case Done():
            return Meaning.DELIVERED
        case Never():
            return Meaning.MESSAGE
        case Later(about_us=about_us):
            return Meaning.US if about_us else Meaning.MOMENT
    return Meaning.UNKNOWN
