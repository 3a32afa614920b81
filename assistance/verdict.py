"""
The verdict on one call to a third party. Each channel translates its vendor's answers.

Done     the third party has the message
Later    it does not have the message, and a later attempt may succeed
Never    it does not have the message, and no attempt will succeed
Unknown  it may have the message: the answer was lost, or the worker died during the call

`code` is a short word or number that operators group by (`429`, `connect_error`). `excerpt` is the
beginning of the answer, redacted: it is stored and shown.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Done:
    code: str
    excerpt: str = ""


@dataclass(frozen=True, slots=True)
class Later:
    """
    retry_after_seconds: the wait that the third party asked for. It can only lengthen the wait.
    wait_seconds: the breaker's wait after a failed probe, which replaces the schedule's.
    about_us: the answer concerns our configuration or this installation, not the message: it opens
    the breaker, and fails no delivery.
    disables: the third party accepts no more messages here, until an operator resumes the
    destination.
    counts: false when no call was made, or when the call tested the destination rather than this
    delivery. It then uses up none of the delivery's attempts.
    """

    code: str
    excerpt: str = ""
    retry_after_seconds: float | None = None
    disables: bool = False
    counts: bool = True
    about_us: bool = False
    wait_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Never:
    code: str
    excerpt: str = ""


@dataclass(frozen=True, slots=True)
class Unknown:
    code: str
    excerpt: str = ""


Verdict = Done | Later | Never | Unknown
