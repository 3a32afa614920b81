"""
Throttling of wrong API keys, per client address.

An address may send up to a minute's number of wrong keys at once; each comes back after its share
of a minute. While none is left, every call with a key from that address is refused unchecked:
checking it would let an attacker go on guessing.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address, ip_network
from time import monotonic
from typing import Any

#: A full table forgets the address whose last wrong key is the oldest.
MAX_ADDRESSES = 10_000

MINUTE_SECONDS = 60.0


@dataclass(slots=True)
class _Guesses:
    """used_until: when all its wrong keys have come back; logged: its throttling was logged."""

    used_until: float
    logged: bool = False


class WrongKeys:
    def __init__(self, per_minute: int, clock: Callable[[], float] = monotonic) -> None:
        """per_minute: 0 disables the throttling; clock: in seconds."""
        self._per_minute = per_minute
        self._clock = clock
        self._guesses: OrderedDict[str, _Guesses] = OrderedDict()

    def __len__(self) -> int:
        return len(self._guesses)

    def wait_seconds(self, address: str) -> float:
        """How long this address has to wait before its next key is checked; 0 if not at all."""
        guesses = self._guesses.get(address)
        if guesses is None or not self._per_minute:
            return 0.0
        one_left = MINUTE_SECONDS - MINUTE_SECONDS / self._per_minute
        return max(0.0, guesses.used_until - self._clock() - one_left)

    def count(self, address: str) -> None:
        if not self._per_minute:
            return
        now = self._clock()
        guesses = self._guesses.setdefault(address, _Guesses(now))
        if guesses.used_until <= now:
            guesses.used_until, guesses.logged = now, False
        guesses.used_until += MINUTE_SECONDS / self._per_minute
        self._guesses.move_to_end(address)
        if len(self._guesses) > MAX_ADDRESSES:
            self._guesses.popitem(last=False)

    def is_news(self, address: str) -> bool:
        """True once for an address, until all its wrong keys have come back."""
        guesses = self._guesses[address]
        news, guesses.logged = not guesses.logged, True
        return news


def address_of(scope: Mapping[str, Any]) -> str:
    """The client's address; of an IPv6 address its /64, which one client usually has as a whole."""
    host = scope["client"][0] if scope.get("client") else ""
    try:
        address = ip_address(host)
    except ValueError:
        return "unknown"
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ip_network((int(address), 64), strict=False))
    return str(address)
