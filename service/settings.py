"""The settings of the REST API. It does not use RabbitMQ."""

import json
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr

from assistance.routing import RoutingTable
from runtime.settings import MongoSettings

KEY_MIN_CHARACTERS = 16

#: Words of examples and templates: a key that contains one was never chosen.
PLACEHOLDERS = ("change-me", "change_me", "changeme", "replace", "example", "placeholder", "your-")


def _split_keys(text: str) -> Any:
    if text.lstrip().startswith("["):
        try:
            keys = json.loads(text)
        except ValueError as error:
            raise ValueError("starts like a JSON list but is not valid JSON") from error
    else:
        keys = [key.strip() for key in text.split(",") if key.strip()]
    if not keys:
        raise ValueError("names no key")
    return keys


def _is_a_real_key(key: SecretStr) -> SecretStr:
    value = key.get_secret_value()
    if any(placeholder in value.lower() for placeholder in PLACEHOLDERS):
        raise ValueError("is a placeholder; make one: openssl rand -hex 24")
    if len(value) < KEY_MIN_CHARACTERS:
        raise ValueError(
            f"has {len(value)} characters; at least {KEY_MIN_CHARACTERS} are needed: "
            "openssl rand -hex 24"
        )
    return key


class ServiceSettings(MongoSettings, RoutingTable):
    api_keys: Annotated[
        tuple[Annotated[SecretStr, AfterValidator(_is_a_real_key)], ...],
        BeforeValidator(_split_keys),
    ] = Field(
        description="API keys of the callers: one or more, separated by commas or as a JSON list, "
        f"each of {KEY_MIN_CHARACTERS} characters or more",
    )
    api_host: str = Field(
        default="127.0.0.1", min_length=1, description="address that the API listens on"
    )
    api_port: int = Field(default=8000, ge=1, le=65535, description="TCP port of the API")
    api_body_limit_bytes: int = Field(
        default=16 * 1024,
        ge=2048,
        description="maximum size of a request body; a longer one is answered 413",
    )
    api_deadline_seconds: float = Field(
        # the driver checks its deadline every half second while it looks for a server, and an
        # answer is promised within three seconds
        default=2.0,
        gt=0,
        le=30,
        description="how long a call waits for MongoDB before it is answered 503",
    )
    idempotency_window_seconds: float = Field(
        default=24 * 3600,
        ge=60,
        le=30 * 24 * 3600,
        description="how long an `Idempotency-Key` is remembered, plus up to a minute",
    )
    shutdown_grace_seconds: float = Field(
        default=10, ge=1, le=300, description="how long calls in progress may take after SIGTERM"
    )
