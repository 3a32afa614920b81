"""What the installation step grants: roles in MongoDB and permissions in RabbitMQ."""

from dataclasses import astuple

from assistance.routing import RoutingTable
from installation.users import mongodb_roles, rabbitmq_permissions
from runtime.settings import RabbitSettings
from tests.support.paths import REPOSITORY

DEPLOY = REPOSITORY / "deploy"

#: role -> its grants, each with `collection`, `actions` and `why`.
ROLES = mongodb_roles()

#: user -> the patterns of what it may configure, write to and read from.
RIGHTS: dict[str, tuple[str, str, str]] = {
    user: astuple(permissions)
    for user, permissions in rabbitmq_permissions(
        RoutingTable().destinations,
        events_exchange=RabbitSettings.model_fields["events_exchange"].default,
    ).items()
}
