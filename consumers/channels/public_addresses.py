"""
The guard against being sent into our own network by somebody's URL (server-side request forgery).

A name is resolved once, every address that it has is checked, and the connection is made to a
checked address itself: a name that answers differently a moment later (DNS rebinding) is not asked
again. `Host`, SNI and the certificate's name stay those of the URL.

Public means unicast of the open Internet. `is_global` alone lets pass what is not: multicast, and
IPv6 addresses that carry an IPv4 address within (https://docs.python.org/3/library/ipaddress.html).
A mapped or NAT64 one (RFC 6052) is judged by the IPv4 address that it leads to; the tunnels 6to4
and Teredo (RFC 7526, RFC 4380) are refused.
"""

import asyncio
import socket
from collections.abc import Sequence
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
)

import httpx

from consumers.channels.http import NotConnected

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

_GLOBAL_UNICAST = IPv6Network("2000::/3")
_NAT64 = IPv6Network("64:ff9b::/96")
_IPV4_BITS = 0xFFFF_FFFF

DEFAULT_PORTS = {"http": 80, "https": 443}

#: Beyond these a name's further addresses are not tried.
TRIED_ADDRESSES = 4


class AddressRefused(NotConnected):
    code = "address_refused"


class NameNotResolved(NotConnected):
    code = "name_not_resolved"


def is_public(address: Address) -> bool:
    if isinstance(address, IPv4Address):
        return address.is_global and not address.is_multicast and not address.is_reserved
    carried = carried_ipv4(address)
    if carried is not None:
        return is_public(carried)
    is_tunnel = address.sixtofour is not None or address.teredo is not None
    return address in _GLOBAL_UNICAST and address.is_global and not is_tunnel


def carried_ipv4(address: IPv6Address) -> IPv4Address | None:
    """The IPv4 address that a mapped or NAT64 address leads to."""
    if address in _NAT64:
        return IPv4Address(int(address) & _IPV4_BITS)
    return address.ipv4_mapped


def is_within(address: Address, networks: Sequence[Network]) -> bool:
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return any((mapped or address) in network for network in networks)


def refusal(address: Address, allowed: Sequence[Network], *, encrypted: bool) -> str | None:
    """Why no connection is made to the address, or None; `allowed` needs no encryption."""
    if is_within(address, allowed):
        return None
    if not is_public(address):
        return "is not public, and not in the allowed networks"
    return None if encrypted else "is not in the allowed networks, and elsewhere it takes https"


class GuardedTransport(httpx.AsyncBaseTransport):
    """
    Connects to checked addresses only; raises AddressRefused or NameNotResolved.

    inner: makes the connection; it is given URLs with an address in the name's place.
    connect_seconds: for all of a name's addresses together, so that a dead one leaves time for the
    next.
    """

    def __init__(
        self,
        inner: httpx.AsyncBaseTransport,
        *,
        allowed: Sequence[Network],
        connect_seconds: float,
    ) -> None:
        self._inner = inner
        self._allowed = allowed
        self._connect_seconds = connect_seconds

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        url = request.url
        name = url.raw_host.decode("ascii")
        addresses = await resolve(name, url.port or DEFAULT_PORTS[url.scheme])
        for address in addresses:
            reason = refusal(address, self._allowed, encrypted=url.scheme == "https")
            if reason:
                raise AddressRefused(f"{name} leads to {address}, which {reason}")
        tried = addresses[:TRIED_ADDRESSES]
        timeout = {"connect": self._connect_seconds / len(tried)}
        extensions = {**request.extensions, "sni_hostname": name, "timeout": timeout}
        for address in tried[:-1]:
            try:
                return await self._call(address, request, extensions)
            except (httpx.ConnectError, httpx.ConnectTimeout):
                continue
        return await self._call(tried[-1], request, extensions)

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def _call(
        self, address: Address, request: httpx.Request, extensions: dict[str, object]
    ) -> httpx.Response:
        return await self._inner.handle_async_request(
            httpx.Request(
                request.method,
                request.url.copy_with(host=str(address)),
                headers=request.headers,
                stream=request.stream,
                extensions=extensions,
            )
        )


async def resolve(name: str, port: int) -> list[Address]:
    """Every address of the name, in the order of preference; raises NameNotResolved."""
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise NameNotResolved(f"{name} has no address") from None
    return [ip_address(place[0]) for *_, place in found]
