"""
What one call to a third party came to. A channel's file translates its vendor into one of these.

Done     it has the message
Later    it does not have it, and another try may help
Never    it does not have it, and no try will help
Unknown  it may have it: the message was sent and no answer came, or the worker died in mid-call

`code` is a short word or number for operators to group by (`429`, `connect_refused`);
`excerpt` is what the third party said, cut and redacted: it is stored and shown.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Done:
    code: str
    excerpt: str = ""


@dataclass(frozen=True, slots=True)
class Later:
    """
    retry_after_seconds: what the third party asked for; it wins over the schedule.
    disables: it wants no more messages here at all, until a person has seen to the destination.
    counts: false where nobody was called, or the destination was tried rather than this delivery:
    then it uses up none of the delivery's attempts.
    """

    code: str
    excerpt: str = ""
    retry_after_seconds: float | None = None
    disables: bool = False
    counts: bool = True


@dataclass(frozen=True, slots=True)
class Never:
    code: str
    excerpt: str = ""


@dataclass(frozen=True, slots=True)
class Unknown:
    code: str
    excerpt: str = ""


Verdict = Done | Later | Never | Unknown
