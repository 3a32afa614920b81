"""Hosts, ports and addresses in settings: what can never work is refused at boot."""

import socket
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError

from consumers.channels.hosts import check_host
from consumers.channels.http import parse_url
from consumers.channels.slack import SlackSettings
from tests.support.outbound import LOOPBACK, email_settings, webhook_settings

labels = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True)
names = st.tuples(st.lists(labels, max_size=3), st.sampled_from(["example", "org", "local"])).map(
    lambda parts: ".".join([*parts[0], parts[1]])
)
addresses = st.ip_addresses().map(str)


def slack(url: str) -> Any:
    return SlackSettings(webhook_url=SecretStr(url))


def slack_api(url: str) -> Any:
    table: dict[str, Any] = {"token": "xoxb-1", "channel": "C1", "api_url": url}
    return SlackSettings(**table)


def webhook(url: str) -> Any:
    return webhook_settings(url, allowed_networks=LOOPBACK)


every_url = pytest.mark.parametrize("read", [slack, slack_api, webhook])


@given(names | addresses)
def test_a_valid_host_is_accepted(host: str) -> None:
    assert check_host(host) == host
    written = f"[{host}]" if ":" in host else host
    assert parse_url(f"https://{written}:443/x").port in (None, 443)


@given(st.text(max_size=80))
@example("mail..example")
@example(".mail.example")
@example("-mail.example")
@example("mail.example:25")
@example("smtp://mail.example")
@example("mail.example/x")
@example("a" * 64 + ".example")
@example("256.1.1.1")
@example("1.2.3.4.5")
@example("")
def test_whatever_is_accepted_can_be_looked_up(host: str) -> None:
    """Resolving fails for want of an answer, never for the form of the name."""
    try:
        check_host(host)
    except ValueError:
        return
    try:
        socket.getaddrinfo(host, 25, flags=socket.AI_NUMERICHOST)
    except socket.gaierror:
        assert host.encode("idna")


@pytest.mark.parametrize(
    "host",
    [
        "mail..example",
        "",
        " ",
        "mail.example:25",
        "smtp://mail.example",
        "mail example",
        "1.2.3.4.5",
    ],
)
def test_a_mail_server_that_can_never_be_found_is_refused(host: str) -> None:
    with pytest.raises(ValidationError, match=r"must be a host name|not a valid IPv4"):
        email_settings(host, 25)
    with pytest.raises(ValidationError, match=r"must be a host name|not a valid IPv4"):
        email_settings("localhost", 25, smtp_ehlo_name=host)


@pytest.mark.parametrize("sender", ["me@mail..example", "me@-x.example", "me@1.2.3.4.5"])
def test_an_address_whose_domain_can_never_be_found_is_refused(sender: str) -> None:
    with pytest.raises(ValidationError, match="sender"):
        email_settings("localhost", 25, sender=sender)


@every_url
@given(port=st.integers(65536, 10**9) | st.just(0))
def test_a_port_that_does_not_exist_is_refused(read: Callable[[str], Any], port: int) -> None:
    with pytest.raises(ValidationError, match=r"port from 1 to 65535|whole URL") as refused:
        read(f"https://127.0.0.1:{port}/hush")
    assert "hush" not in str(refused.value)


@every_url
@pytest.mark.parametrize(
    "authority",
    [
        "hooks..example",
        ".example",
        "-hooks.example",
        "1.2.3.4.5",
        "a" * 64 + ".example",
        "[::1",
        "",
    ],
)
def test_a_host_that_can_never_be_found_is_refused(
    read: Callable[[str], Any], authority: str
) -> None:
    with pytest.raises(ValidationError) as refused:
        read(f"https://{authority}/hush")
    assert "hush" not in str(refused.value)


@every_url
@given(scheme=st.from_regex(r"[a-z][a-z+.-]{0,8}", fullmatch=True))
def test_a_scheme_that_is_not_http_is_refused(read: Callable[[str], Any], scheme: str) -> None:
    if scheme not in ("http", "https"):
        with pytest.raises(ValidationError, match="https://"):
            read(f"{scheme}://hooks.example/x")


@given(st.integers(0, 2**32 - 1).map(IPv4Address), st.integers(0, 2**128 - 1).map(IPv6Address))
def test_every_address_is_a_host(four: IPv4Address, six: IPv6Address) -> None:
    assert check_host(str(four))
    assert check_host(str(six))
