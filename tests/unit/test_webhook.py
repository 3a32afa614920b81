"""The webhook channel's settings, its request body, and which addresses it may call."""

from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any

import orjson
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from assistance.request import DESCRIPTION_LIMIT_CHARACTERS
from consumers.channels import find_channel, settings_table
from consumers.channels.public_addresses import (
    Address,
    Network,
    carried_ipv4,
    is_public,
    refusal,
)
from consumers.channels.webhook import PAYLOAD_LIMIT_BYTES, payload
from tests.support.outbound import (
    LOOPBACK,
    NEXT_SIGNING_SECRET,
    SIGNING_SECRET,
    outbound_message,
    webhook_settings,
)
from tests.support.paths import REPOSITORY

#: https://www.iana.org/assignments/iana-ipv4-special-registry, with multicast and what is reserved
SPECIAL_IPV4 = [
    *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16"),
    *("172.16.0.0/12", "192.0.0.0/29", "192.0.0.8/32", "192.0.0.170/31", "192.0.0.192/32"),
    *("192.0.2.0/24", "192.88.99.1/32", "192.168.0.0/16", "168.63.129.16/32"),
    *("198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
]
#: Neighbours of those, and others that everybody may call.
PUBLIC_IPV4 = [
    *("1.0.0.0/8", "11.0.0.0/8", "100.128.0.0/9", "126.0.0.0/8", "128.0.0.0/8", "169.255.0.0/16"),
    *("172.32.0.0/11", "192.169.0.0/16", "198.20.0.0/14", "203.0.114.0/24", "223.255.0.0/16"),
]

#: https://www.iana.org/assignments/iana-ipv6-special-registry, and what else is not global unicast
SPECIAL_IPV6 = [
    *("::/128", "::1/128", "::/96", "64:ff9b:1::/48", "100::/64", "2001::/32", "2001:db8::/32"),
    *("2001:2::/48", "2001:10::/28", "3fff::/20", "5f00::/16", "100:0:0:1::/64"),
    *("2002::/16", "fc00::/7", "fe80::/10", "fec0::/10", "ff00::/8", "4000::/3"),
]
PUBLIC_IPV6 = ["2400::/12", "2600::/12", "2800::/12", "2a00::/12"]


def addresses_in(networks: list[str]) -> st.SearchStrategy[Any]:
    return st.sampled_from(networks).flatmap(lambda network: st.ip_addresses(network=network))


def every_form_of(address: IPv4Address) -> dict[str, Address]:
    number = int(address)
    return {
        "plain": address,
        "mapped": IPv6Address(0xFFFF << 32 | number),
        "NAT64": IPv6Address(int(IPv6Address("64:ff9b::")) | number),
        "6to4": IPv6Address(0x2002 << 112 | number << 80),
        "ISATAP": IPv6Address(0x2600 << 112 | 0x0000_5EFE << 32 | number),
        "ISATAP of a public address": IPv6Address(0x2600 << 112 | 0x0200_5EFE << 32 | number),
        "Teredo": IPv6Address(0x2001 << 112 | 0x0808_0808 << 64 | number ^ 0xFFFF_FFFF),
    }


@given(addresses_in(SPECIAL_IPV4))
def test_no_form_of_an_inner_address_is_public(address: IPv4Address) -> None:
    assert [form for form, written in every_form_of(address).items() if is_public(written)] == []


@given(addresses_in(SPECIAL_IPV6))
def test_no_special_address_is_public(address: IPv6Address) -> None:
    assert not is_public(address)


@given(st.ip_addresses())
def test_the_own_list_refuses_whatever_python_does_not_call_global(address: Address) -> None:
    """Whatever the patch release: an older one calls more addresses global, a newer one fewer."""
    forms = every_form_of(address) if isinstance(address, IPv4Address) else {"plain": address}
    if not address.is_global and not _is_wrapped(address):
        assert not any(map(is_public, forms.values()))


def _is_wrapped(address: Address) -> bool:
    """Whether it is judged by the IPv4 address within."""
    return isinstance(address, IPv6Address) and carried_ipv4(address) is not None


@given(addresses_in(PUBLIC_IPV4), addresses_in(PUBLIC_IPV6))
def test_what_is_public_is_public_and_so_is_what_leads_to_it(
    four: IPv4Address, six: IPv6Address
) -> None:
    forms = every_form_of(four)
    assert [form for form, written in forms.items() if is_public(written)] == [
        "plain",
        "mapped",
        "NAT64",
    ]
    assert is_public(six)


@given(addresses_in(SPECIAL_IPV4 + SPECIAL_IPV6), addresses_in(SPECIAL_IPV4 + SPECIAL_IPV6))
def test_only_what_is_allowed_is_called_beside_what_is_public(
    inside: Address, outside: Address
) -> None:
    network: Network = (IPv4Network if inside.version == 4 else IPv6Network)(inside)
    assume(outside != inside)
    assert refusal(inside, [network], encrypted=False) is None
    if isinstance(inside, IPv4Address):
        assert refusal(every_form_of(inside)["mapped"], [network], encrypted=False) is None
    assert refusal(outside, [network], encrypted=True) is not None


@given(addresses_in(PUBLIC_IPV4))
def test_nothing_is_sent_to_a_public_address_in_the_clear(address: IPv4Address) -> None:
    assert refusal(address, [], encrypted=True) is None
    assert refusal(address, [], encrypted=False) is not None


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"url": "hooks.example/hush"}, "a whole URL"),
        ({"url": "ftp://hooks.example/hush"}, "a whole URL"),
        ({"url": "https://me:hush@hooks.example/"}, "no user name"),
        ({"url": "http://hooks.example/hush"}, "URL must begin with https://"),
        ({"url": "http://8.8.8.8/hush", "allowed_networks": LOOPBACK}, "require https"),
        *(
            ({"url": f"https://{host}/hush"}, "not public")
            for host in ("127.0.0.1", "127.1", "0x7f.1", "2130706433", "[::ffff:10.0.0.1]", "[::1]")
        ),
        ({"signing_secrets": "whsec_hush"}, "whsec_ and 24 to 64 random bytes"),
        ({"signing_secrets": f"{SIGNING_SECRET},"}, "whsec_ and 24 to 64 random bytes"),
        ({"allowed_networks": "10.0.0.1/8"}, "must be networks"),
    ],
)
def test_a_setting_that_cannot_be_right_is_refused_without_repeating_it(
    given: dict[str, str], named: str
) -> None:
    with pytest.raises(ValidationError, match=named) as refused:
        webhook_settings(**{"url": "https://hooks.example/", **given})
    assert "hush" not in str(refused.value)


def test_a_destination_reads_settings_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STOCK_HOOK_URL", "http://127.0.0.1/in")
    monkeypatch.setenv("STOCK_HOOK_SIGNING_SECRETS", f"{NEXT_SIGNING_SECRET}, {SIGNING_SECRET}")
    monkeypatch.setenv("STOCK_HOOK_ALLOWED_NETWORKS", "10.1.0.0/16, 127.0.0.0/8")
    table: Any = settings_table(find_channel("webhook"), "stock-hook")()
    assert table.allowed_networks == (IPv4Network("10.1.0.0/16"), IPv4Network(LOOPBACK))


def test_no_description_is_too_long_for_a_receiver() -> None:
    for letter in ("\U0001f642", "\x00"):
        longest = replace(outbound_message(), description=letter * DESCRIPTION_LIMIT_CHARACTERS)
        assert len(orjson.dumps(payload(longest))) < PAYLOAD_LIMIT_BYTES / 5


def test_the_page_about_channels_names_every_setting() -> None:
    page = (REPOSITORY / "docs" / "channels.md").read_text()
    for name in ("slack", "email", "webhook"):
        for field in find_channel(name).Settings.model_fields:
            assert f"`{name}_{field}`".upper() in page
