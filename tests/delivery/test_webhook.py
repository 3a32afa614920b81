"""What a webhook's receiver gets, and where a webhook can never be sent."""

import asyncio
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from loguru import logger
from standardwebhooks import Webhook as Receiver
from standardwebhooks import WebhookVerificationError

from assistance.verdict import Done, Later, Verdict
from consumers.channels.webhook import Webhook, WebhookSettings
from sandbox.waiting import wait_until
from tests.conftest import RunProcess
from tests.support.deliveries import CHANNEL_OF, Deliveries
from tests.support.listeners import make_certificate, server_that, tls_of
from tests.support.outbound import (
    LOOPBACK,
    NEXT_SIGNING_SECRET,
    SIGNING_SECRET,
    outbound_message,
    webhook_settings,
)
from tests.support.third_parties import ThirdParties

NAME = "hooks.example.test"
MESSAGE = outbound_message()


async def send(table: WebhookSettings) -> Verdict:
    webhook = Webhook(table, call_timeout_seconds=2)
    try:
        return await webhook.send(MESSAGE)
    finally:
        await webhook.close()


async def test_the_receiver_can_verify_the_sender_and_recognise_a_repeat(
    third_parties: ThirdParties,
) -> None:
    """While a secret is replaced, the signature can be verified with either of the two."""
    table = webhook_settings(
        third_parties.webhooks_url + "desk",
        signing_secrets=f"{NEXT_SIGNING_SECRET},{SIGNING_SECRET}",
        allowed_networks=LOOPBACK,
    )
    assert [await send(table), await send(table)] == [Done("204"), Done("204")]

    first, second = third_parties.received("webhook")
    headers = dict(first["headers"])
    for secret in (NEXT_SIGNING_SECRET, SIGNING_SECRET):
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


async def test_an_answer_410_disables_the_destination(
    third_parties: ThirdParties,
) -> None:
    third_parties.misbehave("webhook", "status", code=410, body="closed permanently")
    table = webhook_settings(third_parties.webhooks_url + "desk", allowed_networks=LOOPBACK)
    assert await send(table) == Later("410", "closed permanently", disables=True, about_us=True)


def test_after_an_answer_410_the_destination_is_suspended_and_requests_wait(
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
    is_suspended = {"_id": "desk", "paused.why": {"$regex": "410"}}
    wait_until(
        lambda: deliveries.database["destinations"].find_one(is_suspended), "it is suspended"
    )

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
        verdict = await send(
            webhook_settings(f"https://{NAME}:{port}/in", allowed_networks=LOOPBACK)
        )
    assert isinstance(verdict, Done)
    assert f"host: {NAME}:{port}" in verdict.excerpt.lower()
    assert (names.asked, greeted) == ([NAME], [NAME])


async def test_a_certificate_for_another_name_is_refused(
    certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    Names(monkeypatch, ["127.0.0.1"])
    async with server_that(accept, tls_of(certificate)) as port:
        verdict = await send(
            webhook_settings(f"https://other.test:{port}/in", allowed_networks=LOOPBACK)
        )
    assert verdict == Later("tls_failed", about_us=True)


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
        calls.append("called")

    async with server_that(hear) as port:
        verdict = await send(
            webhook_settings(f"https://{NAME}:{port}/hush", allowed_networks="127.0.0.7")
        )
    logger.remove(sink)
    assert verdict == Later(
        "address_refused",
        f"{NAME} leads to {ip_address(answer[-1])}, which is not public, and not in the allowed "
        "networks",
        about_us=True,
    )
    assert (names.asked, calls) == ([NAME], [])
    assert logged == ["ERROR webhook.misconfigured {'code': 'address_refused'}\n"]


async def test_a_name_that_cannot_be_resolved_is_tried_later() -> None:
    table = webhook_settings("https://nowhere.invalid/in")
    verdict = await send(table)
    assert verdict == Later("name_not_resolved", "nowhere.invalid has no address")
