"""The settings of the REST API. It does not use RabbitMQ."""

import json
from ipaddress import ip_network
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationInfo

from assistance.routing import RoutingTable
from runtime.settings import MongoSettings

KEY_MIN_CHARACTERS = 16
KEY_MIN_DISTINCT_CHARACTERS = 6

MAKE_A_KEY = "make one: openssl rand -hex 24"

#: Words of examples and templates: a key that contains one was never chosen.
PLACEHOLDERS = ("change-me", "change_me", "changeme", "replace", "example", "placeholder", "your-")


def _named_keys(text: str) -> Any:
    """Each key by its name; keys without names are called `key-1`, `key-2` and so on."""
    if text.lstrip().startswith(("[", "{")):
        try:
            keys = json.loads(text, object_pairs_hook=_without_repeated_names)
        except json.JSONDecodeError as error:
            raise ValueError("starts like JSON but is not valid JSON") from error
    else:
        keys = [key.strip() for key in text.split(",") if key.strip()]
    if not keys:
        raise ValueError("names no key")
    if isinstance(keys, list):
        return {f"key-{number}": key for number, key in enumerate(keys, start=1)}
    if len(set(map(str, keys.values()))) < len(keys):
        raise ValueError("gives one key two names; every caller needs a key of its own")
    return keys


def _without_repeated_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError("uses a name twice")
    return dict(pairs)


def _is_a_usable_key(key: SecretStr, info: ValidationInfo) -> SecretStr:
    value = key.get_secret_value()
    if any(placeholder in value.lower() for placeholder in PLACEHOLDERS):
        raise ValueError(f"is a placeholder; {MAKE_A_KEY}")
    if not value or value != value.strip() or not value.isprintable():
        raise ValueError("is empty, or has a character that a header cannot carry")
    weakness = weakness_of(value)
    if weakness and not info.data.get("api_allow_weak_keys"):
        raise ValueError(f"{weakness}; {MAKE_A_KEY}, or set API_ALLOW_WEAK_KEYS=true")
    return key


def weakness_of(key: str) -> str | None:
    """Why a key is easy to guess; None if it is not."""
    if len(key) < KEY_MIN_CHARACTERS:
        return f"has {len(key)} characters; at least {KEY_MIN_CHARACTERS} are needed"
    if len(set(key)) < KEY_MIN_DISTINCT_CHARACTERS:
        return f"has fewer than {KEY_MIN_DISTINCT_CHARACTERS} different characters"
    return None


def _are_networks(text: str) -> str:
    for address in text.split(","):
        try:
            ip_network(address.strip())
        except ValueError as error:
            raise ValueError(f"names no address or network: {address.strip()!r}") from error
    return text


KeyName = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]


class ServiceSettings(MongoSettings, RoutingTable):
    # before the keys, whose check reads it
    api_allow_weak_keys: bool = Field(
        default=False,
        description="whether API keys may be short or easy to guess, as the key `12345678` of the "
        "original service's clients; guesses are then limited by `API_WRONG_KEYS_PER_MINUTE` alone",
    )
    api_keys: Annotated[
        dict[KeyName, Annotated[SecretStr, AfterValidator(_is_a_usable_key)]],
        BeforeValidator(_named_keys),
    ] = Field(
        description="API keys of the callers: separated by commas, a JSON list, or a JSON object "
        'with a name for each (`{"chatbot": "key"}`), which is logged with every call; each key '
        f"has {KEY_MIN_CHARACTERS} characters or more",
    )
    api_wrong_keys_per_minute: int = Field(
        default=30,
        ge=0,
        le=6000,
        description="how many wrong API keys an address may send in a minute before all its calls "
        "are answered 429 for a while; 0 disables the limit",
    )
    api_trusted_proxies: Annotated[str, AfterValidator(_are_networks)] = Field(
        default="127.0.0.1,::1",
        description="addresses or networks of reverse proxies, separated by commas, whose header "
        "`X-Forwarded-For` names the client's address",
    )
    api_max_connections: int = Field(
        default=512,
        ge=1,
        description="maximum number of open connections to the API; a further one replaces the "
        "longest idle one, or is answered 503 if none is idle",
    )
    api_receive_deadline_seconds: float = Field(
        default=10,
        gt=0,
        le=300,
        description="how long a client may take to send a request's head, and then its body, "
        "before it is answered 408",
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

    def weak_keys(self) -> list[str]:
        """The names of the keys that only API_ALLOW_WEAK_KEYS lets pass."""
        keys = self.api_keys.items()
        return [name for name, key in keys if weakness_of(key.get_secret_value())]
