"""
The guard against server-side request forgery: a webhook's URL must not lead into our own network.

A name is resolved once per call, every address that it has is checked, and the connection is made
to a checked address: a name that resolves differently a moment later (DNS rebinding) is not
resolved again. `Host`, SNI and the certificate's name stay those of the URL.

Public means unicast of the open Internet, by our own list rather than by `ipaddress.is_global`,
which differs between patch releases of Python and calls multicast and 6to4 global. An address that
carries an IPv4 address (mapped, NAT64 by RFC 6052) is judged by that one; the tunnels 6to4, Teredo
and ISATAP (RFC 7526, RFC 4380, RFC 5214) are refused.
"""

import asyncio
import socket
from collections.abc import Sequence
from datetime import date
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

#: The date of the lists below. Compare them with the registries when it is more than a year ago.
SPECIAL_ADDRESSES_AS_OF = date(2026, 11, 27)

#: https://www.iana.org/assignments/iana-ipv4-special-registry, without the anycast services that it
#: calls globally reachable, and with multicast and addresses of cloud providers.
SPECIAL_IPV4 = tuple(
    IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # shared address space, and Alibaba Cloud's metadata
        "127.0.0.0/8",  # loopback
        "168.63.129.16/32",  # Azure's platform services, reachable from each of its machines
        "169.254.0.0/16",  # link-local, and most clouds' metadata
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments, the dummy 192.0.0.8, and Oracle Cloud's metadata
        "192.0.2.0/24",  # documentation
        "192.88.99.0/24",  # 6to4 relays, deprecated
        "192.168.0.0/16",  # private
        "198.18.0.0/15",  # benchmarking
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, and broadcast
    )
)

#: https://www.iana.org/assignments/iana-ipv6-address-space: all else is not unicast of the Internet
_GLOBAL_UNICAST = IPv6Network("2000::/3")

#: https://www.iana.org/assignments/iana-ipv6-special-registry, as far as it is in 2000::/3
SPECIAL_IPV6 = tuple(
    IPv6Network(network)
    for network in (
        "2001::/23",  # protocol assignments: Teredo, benchmarking, ORCHID
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4
        "3fff::/20",  # documentation
    )
)

_MAPPED = IPv6Network("::ffff:0:0/96")
_NAT64 = IPv6Network("64:ff9b::/96")
_IPV4_BITS = 0xFFFF_FFFF

#: The upper half of an interface identifier of ISATAP: https://www.rfc-editor.org/rfc/rfc5214#section-6.1
_ISATAP = (0x0000_5EFE, 0x0200_5EFE)

DEFAULT_PORTS = {"http": 80, "https": 443}

#: Further addresses of a name are not tried.
MAX_TRIED_ADDRESSES = 4


class AddressRefused(NotConnected):
    code = "address_refused"
    about_us = True


class NameNotResolved(NotConnected):
    code = "name_not_resolved"
    about_us = False


def is_public(address: Address) -> bool:
    if isinstance(address, IPv4Address):
        return not any(address in network for network in SPECIAL_IPV4)
    carried = carried_ipv4(address)
    if carried is not None:
        return is_public(carried)
    is_special = any(address in network for network in SPECIAL_IPV6)
    is_isatap = int(address) >> 32 & _IPV4_BITS in _ISATAP
    return address in _GLOBAL_UNICAST and not is_special and not is_isatap


def carried_ipv4(address: IPv6Address) -> IPv4Address | None:
    """The IPv4 address that a mapped or NAT64 address leads to."""
    if address in _NAT64 or address in _MAPPED:
        return IPv4Address(int(address) & _IPV4_BITS)
    return None


def is_within(address: Address, networks: Sequence[Network]) -> bool:
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return any((mapped or address) in network for network in networks)


def refusal(address: Address, allowed: Sequence[Network], *, encrypted: bool) -> str | None:
    """The reason to refuse the address, or None. Allowed networks need no encryption."""
    if is_within(address, allowed):
        return None
    if not is_public(address):
        return "is not public, and not in the allowed networks"
    return None if encrypted else "is not in the allowed networks, and all others require https"


class GuardedTransport(httpx.AsyncBaseTransport):
    """
    Connects to checked addresses only; raises AddressRefused or NameNotResolved.

    inner: makes the connection; it gets URLs with an address in place of the name.
    connect_seconds: for all addresses of a name together, so that one that does not answer leaves
    time for the next.
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
        tried = addresses[:MAX_TRIED_ADDRESSES]
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
    """Every address of the name, in order of preference; raises NameNotResolved."""
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise NameNotResolved(f"{name} has no address") from None
    return [ip_address(place[0]) for *_, place in found]
