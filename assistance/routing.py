"""
Which destinations a topic goes to.

A channel is a kind of third party (slack, email); a destination is one configured place of a
channel; a topic routes to one or more destinations, decided once, when the request is accepted.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, Field, Json, ValidationInfo, field_validator

#: Names end up in routing keys, queue names and environment variables.
_NAME = re.compile(r"[a-z][a-z0-9-]{0,62}")

#: `python -m consumers run` knows these by name, so no destination may be called so.
RESERVED_NAMES = frozenset({"dead-letters", "reconciler"})


class RoutingError(ValueError):
    """The configured routes cannot work; lists every problem, one a line."""


@dataclass(frozen=True, slots=True)
class Destination:
    name: str
    channel: str


@dataclass(frozen=True, slots=True)
class Routing:
    destinations: Mapping[str, Destination]
    routes: Mapping[str, tuple[Destination, ...]]

    @property
    def topics(self) -> tuple[str, ...]:
        return tuple(self.routes)

    def destinations_of(self, topic: str) -> tuple[Destination, ...]:
        return self.routes[topic]


def check_routing(channels: Mapping[str, str], routes: Mapping[str, list[str]]) -> Routing:
    """
    channels: destination name -> channel name; routes: topic -> destination names.

    Raises RoutingError, naming every problem at once.
    """
    problems = [
        f"destination {name!r}: a name is lower-case letters, digits and hyphens, letter first"
        for name in channels
        if not _NAME.fullmatch(name)
    ]
    problems += [
        f"destination {name!r}: this name is taken by a process; choose another"
        for name in channels
        if name in RESERVED_NAMES
    ]
    if not routes:
        problems.append("no topic is routed anywhere")
    for topic, names in routes.items():
        if not topic.strip() or "." in topic:
            problems.append(f"topic {topic!r}: a topic is a word without dots")
        if not names:
            problems.append(f"topic {topic!r} has no destination")
        if len(set(names)) != len(names):
            problems.append(f"topic {topic!r} names a destination twice")
        problems += [
            f"topic {topic!r} goes to {name!r}, which is not a destination; "
            f"known: {', '.join(sorted(channels)) or 'none'}"
            for name in names
            if name not in channels
        ]
    if problems:
        raise RoutingError("\n".join(problems))
    destinations = {name: Destination(name, channel) for name, channel in channels.items()}
    return Routing(
        destinations,
        {topic: tuple(destinations[name] for name in names) for topic, names in routes.items()},
    )


#: As a person would write them, so that they are read and checked like any other value.
DEFAULT_DESTINATIONS: Any = '{"slack": "slack", "email": "email"}'
DEFAULT_ROUTES: Any = '{"sales": ["slack"], "pricing": ["email"]}'


class RoutingTable(BaseModel):
    """The two settings that say where topics go, for the table of every process that needs them."""

    destinations: Json[dict[str, str]] = Field(
        default=DEFAULT_DESTINATIONS,
        validate_default=True,
        description="JSON: each destination and its channel",
    )
    routes: Json[dict[str, list[str]]] = Field(
        default=DEFAULT_ROUTES,
        validate_default=True,
        description="JSON: each topic and the destinations that its requests go to",
    )

    @field_validator("routes")
    @classmethod
    def _routes_lead_somewhere(
        cls, routes: dict[str, list[str]], info: ValidationInfo
    ) -> dict[str, list[str]]:
        if "destinations" in info.data:
            check_routing(info.data["destinations"], routes)
        return routes

    @property
    def routing(self) -> Routing:
        return check_routing(self.destinations, self.routes)
