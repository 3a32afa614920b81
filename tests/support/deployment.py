"""What `deploy/` grants: roles in MongoDB and rights in RabbitMQ."""

import json
from typing import Any

from tests.support.paths import REPOSITORY

DEPLOY = REPOSITORY / "deploy"

#: role -> its grants, each with `collection`, `actions` and `why`.
ROLES: dict[str, list[dict[str, Any]]] = json.loads((DEPLOY / "mongodb" / "roles.json").read_text())

#: user -> the patterns of what it may configure, write to and read from.
RIGHTS = {
    user: patterns
    for user, *patterns in map(str.split, (DEPLOY / "rabbitmq" / "rights").read_text().splitlines())
    if user != "#"
}
