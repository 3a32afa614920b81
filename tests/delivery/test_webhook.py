"""What a webhook's receiver gets, and where a webhook can never be sent."""

import asyncio
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from loguru import logger
from pydantic import ValidationError
from standardwebhooks import Webhook as Receiver
from standardwebhooks import WebhookVerificationError

from assistance.request import DESCRIPTION_LIMIT_CHARACTERS
from assistance.verdict import Done, Later, Verdict
from consumers.channels import find_channel, settings_table
from consumers.channels.public_addresses import Address, Network, is_public, refusal
from consumers.channels.webhook import PAYLOAD_LIMIT_BYTES, Webhook, WebhookSettings, payload
from tests.conftest import RunProcess
from tests.delivery.test_http_channels import MESSAGE, SIGNING_SECRET
from tests.support.deliveries import CHANNEL_OF, Deliveries
from tests.support.listeners import make_certificate, server_that, tls_of
from tests.support.paths import REPOSITORY
from tests.support.third_parties import ThirdParties
from tests.support.waiting import wait_until

LOOPBACK = "127.0.0.0/8"
NEXT_SECRET = "whsec_" + "bmV4dG5leHRuZXh0bmV4dG5leHRuZXh0"
NAME = "hooks.example.test"

#: https://www.iana.org/assignments/iana-ipv4-special-registry, with multicast and what is reserved
SPECIAL_IPV4 = [
    *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16"),
    *("172.16.0.0/12", "192.0.0.0/29", "192.0.0.170/31", "192.0.2.0/24", "192.168.0.0/16"),
    *("198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
]
#: Neighbours of those, and others that everybody may call.
PUBLIC_IPV4 = [
    *("1.0.0.0/8", "11.0.0.0/8", "100.128.0.0/9", "126.0.0.0/8", "128.0.0.0/8", "169.255.0.0/16"),
    *("172.32.0.0/11", "192.169.0.0/16", "198.20.0.0/14", "203.0.114.0/24", "223.255.0.0/16"),
]

#: https://www.iana.org/assignments/iana-ipv6-special-registry, with what else is no global unicast
SPECIAL_IPV6 = [
    *("::/128", "::1/128", "::/96", "64:ff9b:1::/48", "100::/64", "2001::/32", "2001:db8::/32"),
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
        "Teredo": IPv6Address(0x2001 << 112 | 0x0808_0808 << 64 | number ^ 0xFFFF_FFFF),
    }


@given(addresses_in(SPECIAL_IPV4))
def test_no_form_of_an_inner_address_is_public(address: IPv4Address) -> None:
    assert [form for form, written in every_form_of(address).items() if is_public(written)] == []


@given(addresses_in(SPECIAL_IPV6))
def test_no_special_address_is_public(address: IPv6Address) -> None:
    assert not is_public(address)


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


def settings(url: str, **others: str) -> WebhookSettings:
    values: dict[str, Any] = {"url": url, "signing_secrets": SIGNING_SECRET, **others}
    return WebhookSettings(**values)


async def send(table: WebhookSettings) -> Verdict:
    webhook = Webhook(table, call_timeout_seconds=2)
    try:
        return await webhook.send(MESSAGE)
    finally:
        await webhook.close()


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"url": "hooks.example/hush"}, "a whole URL"),
        ({"url": "ftp://hooks.example/hush"}, "a whole URL"),
        ({"url": "https://me:hush@hooks.example/"}, "no user name"),
        ({"url": "http://hooks.example/hush"}, "URL must begin with https://"),
        ({"url": "http://8.8.8.8/hush", "allowed_networks": LOOPBACK}, "takes https"),
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
        settings(**{"url": "https://hooks.example/", **given})
    assert "hush" not in str(refused.value)


def test_a_destination_reads_settings_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STOCK_HOOK_URL", "http://127.0.0.1/in")
    monkeypatch.setenv("STOCK_HOOK_SIGNING_SECRETS", f"{NEXT_SECRET}, {SIGNING_SECRET}")
    monkeypatch.setenv("STOCK_HOOK_ALLOWED_NETWORKS", "10.1.0.0/16, 127.0.0.0/8")
    table: Any = settings_table(find_channel("webhook"), "stock-hook")()
    assert table.allowed_networks == (IPv4Network("10.1.0.0/16"), IPv4Network(LOOPBACK))


async def test_the_receiver_can_tell_who_sent_it_and_whether_it_is_a_repeat(
    third_parties: ThirdParties,
) -> None:
    """While a secret is replaced, whoever knows either of the two is convinced."""
    table = settings(
        third_parties.webhooks_url + "desk",
        signing_secrets=f"{NEXT_SECRET},{SIGNING_SECRET}",
        allowed_networks=LOOPBACK,
    )
    assert [await send(table), await send(table)] == [Done("204"), Done("204")]

    first, second = third_parties.received("webhook")
    headers = dict(first["headers"])
    for secret in (NEXT_SECRET, SIGNING_SECRET):
        said = Receiver(secret).verify(first["body"], headers)
    with pytest.raises(WebhookVerificationError):
        Receiver("whsec_" + "c3RyYW5nZXJzdHJhbmdlcnN0cmFuZ2Vy").verify(first["body"], headers)
    assert said == {
        "type": "assistance.requested",
        "timestamp": "2026-11-23T12:00:00+00:00",
        "data": {
            "request_id": MESSAGE.request_id,
            "topic": "sales",
            "description": MESSAGE.description,
            "created_at": "2026-11-23T12:00:00+00:00",
        },
    }
    assert headers["webhook-id"] == MESSAGE.idempotency_key == first["idempotency_key"]
    assert (dict(second["headers"])["webhook-id"], second["body"]) == (
        headers["webhook-id"],
        first["body"],
    )
    assert second["repeat"]


def test_no_description_is_too_long_for_a_receiver() -> None:
    for letter in ("\U0001f642", "\x00"):
        longest = replace(MESSAGE, description=letter * DESCRIPTION_LIMIT_CHARACTERS)
        assert len(orjson.dumps(payload(longest))) < PAYLOAD_LIMIT_BYTES / 5


async def test_a_receiver_that_is_gone_for_good_disables_its_destination(
    third_parties: ThirdParties,
) -> None:
    third_parties.misbehave("webhook", "status", code=410, body="closed for ever")
    table = settings(third_parties.webhooks_url + "desk", allowed_networks=LOOPBACK)
    assert await send(table) == Later("410", "closed for ever", disables=True)


def test_a_destination_that_is_gone_for_good_is_paused_and_its_requests_wait(
    run_process: RunProcess,
    deliveries: Deliveries,
    third_parties: ThirdParties,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(CHANNEL_OF, "desk", "webhook")
    third_parties.misbehave("webhook", "status", code=410)
    environment = deliveries.environment(
        destinations='{"desk": "webhook"}',
        routes='{"sales": ["desk"]}',
        desk_url=third_parties.webhooks_url + "desk",
        desk_signing_secrets=SIGNING_SECRET,
        desk_allowed_networks=LOOPBACK,
    )
    worker = run_process("consumers", "run", "desk", environment=environment)
    worker.wait_log("queue.receiving")
    first = deliveries.accept(destinations=["desk"])
    deliveries.publish_pending()
    is_paused = {"_id": "desk", "paused.why": {"$regex": "410"}}
    wait_until(lambda: deliveries.database["destinations"].find_one(is_paused), "it is paused")

    with deliveries.channel() as channel:

        def queue() -> Any:
            return channel.queue_declare("deliveries.desk", passive=True).method

        wait_until(lambda: queue().consumer_count == 0, "the worker has left the queue")
        second = deliveries.accept(destinations=["desk"])
        deliveries.publish_pending()
        wait_until(lambda: queue().message_count == 1, "the second request waits")
    assert [deliveries.request(one)["status"] for one in (first, second)] == ["accepted"] * 2
    assert len(third_parties.calls("webhook")) == 1


class Names:
    """Answers for the name server; `asked` holds every name that was looked up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *answers: list[str]) -> None:
        self.asked: list[str] = []
        self._answers = list(answers)
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", self.look_up)

    async def look_up(self, host: str, port: int, **_: Any) -> list[Any]:
        self.asked.append(host)
        return [(0, 0, 0, "", (address, port)) for address in self._answers.pop(0)]


async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(head), head))
    await writer.drain()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificate(tmp_path_factory.mktemp("certificate"), f"DNS:{NAME}")


async def test_the_address_that_was_checked_is_the_one_that_is_called(
    certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name is asked for once; to the receiver and its certificate it is still the name."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    greeted: list[str | None] = []
    tls = tls_of(certificate)
    tls.sni_callback = lambda _socket, name, _context: greeted.append(name)
    # the first of its addresses is dead, and a second look-up would lead elsewhere
    names = Names(monkeypatch, ["127.0.0.9", "127.0.0.1"], ["10.0.0.1"])
    async with server_that(accept, tls) as port:
        verdict = await send(settings(f"https://{NAME}:{port}/in", allowed_networks=LOOPBACK))
    assert isinstance(verdict, Done)
    assert f"host: {NAME}:{port}" in verdict.excerpt.lower()
    assert (names.asked, greeted) == ([NAME], [NAME])


async def test_a_name_is_not_believed_without_its_certificate(
    certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    Names(monkeypatch, ["127.0.0.1"])
    async with server_that(accept, tls_of(certificate)) as port:
        verdict = await send(settings(f"https://other.test:{port}/in", allowed_networks=LOOPBACK))
    assert verdict == Later("tls_failed")


@pytest.mark.parametrize(
    "answer",
    [
        *(["127.0.0.1"], ["::1"], ["::ffff:127.0.0.1"], ["64:ff9b::7f00:1"], ["2002:7f00:1::"]),
        *(["169.254.169.254"], ["224.0.0.1"], ["fe80::1%lo"]),
        # one bad address is enough, wherever it stands
        ["127.0.0.7", "127.0.0.1"],
    ],
)
async def test_a_name_that_leads_into_our_own_network_is_not_called(
    answer: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    logged: list[str] = []
    sink = logger.add(lambda line: logged.append(str(line)), format="{level} {message} {extra}")
    names = Names(monkeypatch, answer)

    async def hear(_reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        calls.append("somebody")

    async with server_that(hear) as port:
        verdict = await send(settings(f"https://{NAME}:{port}/hush", allowed_networks="127.0.0.7"))
    logger.remove(sink)
    assert verdict == Later(
        "address_refused",
        f"{NAME} leads to {ip_address(answer[-1])}, which is not public, and not in the allowed "
        "networks",
    )
    assert (names.asked, calls) == ([NAME], [])
    assert logged == ["ERROR webhook.misconfigured {'code': 'address_refused'}\n"]


async def test_a_name_that_nobody_knows_is_tried_later() -> None:
    verdict = await send(settings("https://nowhere.invalid/in"))
    assert verdict == Later("name_not_resolved", "nowhere.invalid has no address")


def test_the_page_about_channels_names_every_setting() -> None:
    page = (REPOSITORY / "docs" / "channels.md").read_text()
    for name in ("slack", "email", "webhook"):
        for field in find_channel(name).Settings.model_fields:
            assert f"`{name}_{field}`".upper() in page
