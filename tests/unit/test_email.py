"""The e-mail composed for a request, and the settings of the e-mail channel."""

from email import message_from_bytes, policy
from email.message import EmailMessage
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError

from consumers.channels import OutboundMessage
from consumers.channels.email import Tls, compose, subject
from consumers.channels.text import one_line
from tests.support.outbound import NOW, email_settings, outbound_message

HEADERS = ["Subject", "From", "To", "Date", "Message-ID", "X-Request-ID"]

mail_message = partial(outbound_message, topic="pricing")


def as_read(sent: OutboundMessage) -> EmailMessage:
    mail = compose(sent, sender="from@example.org", recipients=["to@example.org"])
    return message_from_bytes(mail.as_bytes(), policy=policy.default)


def test_a_mail_has_every_header_that_a_mail_should_have() -> None:
    mail = as_read(mail_message("Was kostet das Große? 🙂"))
    assert mail["Subject"] == "[pricing] Was kostet das Große? 🙂"
    assert mail["From"] == "from@example.org"
    assert mail["To"] == "to@example.org"
    assert mail["Date"].datetime == NOW
    assert mail["Message-ID"] == f"<{mail_message().idempotency_key}@example.org>"
    assert mail["X-Request-ID"] == mail_message().request_id
    assert "Was kostet das Große? 🙂" in mail.get_content()


def test_a_repeat_is_the_same_mail_and_says_that_it_may_be_one() -> None:
    first, second = as_read(mail_message()), as_read(mail_message(may_be_repeat=True))
    assert [first[name] for name in HEADERS] == [second[name] for name in HEADERS]
    assert "may be a repeat" in second.get_content()
    assert "may be a repeat" not in first.get_content()


@pytest.mark.parametrize("end", ["\r\n", "\n", "\r", "\x0b", "\x0c", "\x85", "\u2028", "\x00"])
def test_no_description_can_add_a_header(end: str) -> None:
    mail = as_read(mail_message(f"hello{end}Bcc: everybody@example.org{end}{end}<b>body</b>"))
    assert [name for name in mail.keys() if name in {*HEADERS, "Bcc"}] == HEADERS  # noqa: SIM118
    assert (
        mail["Subject"]
        .replace("\ufffd", " ")
        .startswith("[pricing] hello Bcc: everybody@example.org")
    )


@given(
    st.text(min_size=1, max_size=300),
    st.text(min_size=1, max_size=40),
    st.text(min_size=1, max_size=60),
)
def test_no_text_whatsoever_can_add_a_header(description: str, topic: str, request_id: str) -> None:
    mail = as_read(mail_message(description, topic=topic, request_id=request_id))
    assert [name for name in mail.keys() if not name.startswith("Content")] == [  # noqa: SIM118
        *HEADERS,
        "MIME-Version",
    ]
    assert not mail.defects


@given(st.text(max_size=1000))
def test_a_subject_is_one_line_and_not_too_long(text: str) -> None:
    line = subject("pricing", text)
    assert len(line.splitlines()) <= 1
    assert len(line) <= 120
    assert one_line(line) == line


@pytest.mark.parametrize(
    "recipients", ["", "nobody", "a@b\r\nRCPT TO:<x@y>", "a@b c@d", "a@b,", "@b", "a@", "ä@b.c"]
)
def test_addresses_that_are_none_are_refused(recipients: str) -> None:
    with pytest.raises(ValidationError, match="recipients"):
        email_settings("localhost", 25, recipients=recipients)


def test_a_password_never_goes_in_the_clear() -> None:
    with pytest.raises(ValidationError, match="in the clear"):
        email_settings("localhost", 25, smtp_username="me", smtp_password=SecretStr("hush"))


def test_a_name_without_a_password_is_refused() -> None:
    with pytest.raises(ValidationError, match="go together"):
        email_settings("localhost", 25, smtp_tls=Tls.TLS, smtp_username="me")


@given(st.text(max_size=300))
def test_no_description_imitates_the_frame_around_it(description: str) -> None:
    body = as_read(mail_message(description)).get_content().rstrip("\n")
    *quotation, empty, topic, request, received = body.splitlines()
    assert all(line.startswith("> ") for line in quotation)
    assert (empty, topic) == ("", "Topic: pricing")
    assert request.startswith("Request: 6b1f1a0e-")
    assert received.startswith("Received: 2026-11-23")


def test_the_mail_server_is_greeted_with_a_name_that_is_not_the_containers() -> None:
    assert email_settings("localhost", 25).ehlo_name == "example.org"
    assert email_settings("localhost", 25, smtp_ehlo_name="mx.example.com").ehlo_name == (
        "mx.example.com"
    )
    assert email_settings("localhost", 25, smtp_ehlo_name="192.0.2.1").ehlo_name == "[192.0.2.1]"
    assert email_settings("localhost", 25, smtp_ehlo_name="2001:db8::1").ehlo_name == (
        "[IPv6:2001:db8::1]"
    )
