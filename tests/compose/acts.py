"""What is done to the running system; each act returns once everything is healthy again."""

import json
from collections.abc import Callable
from typing import Any

from sandbox.waiting import wait_until
from tests.compose.engine import CommandFailed, Container, Project, run

SERVERS = ("mongodb", "rabbitmq")
PROCESSES = ("service", "relay", "slack", "email", "dead-letters", "reconciler")
HEALTHY_SECONDS = 180
DELIVERED_SECONDS = 300

READ_METRICS = """
from urllib.request import urlopen
print(urlopen("http://127.0.0.1:8010/metrics", timeout=5).read().decode())
"""

Say = Callable[[str], None]


class ActFailed(Exception):
    """The system did not do what it promises; the message says what was awaited."""


def wait_healthy(project: Project, *services: str) -> None:
    names = services or (*SERVERS, *PROCESSES)

    def unhealthy() -> list[str]:
        found = project.containers(*names)
        missing = set(names) - {container.service for container in found}
        return [*missing, *(one.name for one in found if not one.is_healthy)]

    seen: list[str] = []

    def all_healthy() -> bool:
        seen[:] = unhealthy()
        return not seen

    try:
        wait_until(
            all_healthy,
            "every container is healthy",
            deadline_seconds=HEALTHY_SECONDS,
            max_pause_seconds=1.0,
        )
    except AssertionError as late:
        raise ActFailed(f"not healthy within {HEALTHY_SECONDS} s: {', '.join(seen)}") from late


def kill_each(project: Project, say: Say) -> int:
    """SIGKILL to every container, one after the other, whatever it is; how many were killed."""
    killed = 0
    for victim in project.running(*SERVERS, *PROCESSES):
        victim.kill()
        _wait_restarted(victim)
        wait_healthy(project)
        say(f"killed {victim.name}: back and healthy")
        killed += 1
    return killed


def cut_network_of_leader(project: Project, say: Say) -> None:
    """The leading relay loses its only network; the other takes over; then it comes back."""
    relays = project.running("relay")
    leaders = [relay for relay in relays if _leads(relay)]
    if len(relays) != len({*leaders}) + 1:
        raise ActFailed(f"one of two relays must lead: {len(leaders)} of {len(relays)} do")
    (leader,) = leaders
    (standby,) = (relay for relay in relays if relay is not leader)
    network = f"{project.name}_inside"
    aliases = leader.aliases[network]
    leader.disconnect(network)
    try:
        wait_until(
            lambda: _leads(standby),
            f"{standby.name} leads while {leader.name} has no network",
            deadline_seconds=HEALTHY_SECONDS,
            max_pause_seconds=1.0,
            error=ActFailed,
        )
    finally:
        leader.connect(network, aliases)
    wait_healthy(project)
    say(f"cut the network of {leader.name}: {standby.name} led, both are healthy again")


def scale_workers(project: Project, say: Say) -> None:
    project.compose("up", "--detach", "--no-recreate", "--scale", "slack=3", "--scale", "email=3")
    wait_healthy(project)
    counts = {name: len(project.running(name)) for name in ("slack", "email")}
    if set(counts.values()) != {3}:
        raise ActFailed(f"three workers of each destination were asked for: {counts}")
    say("scaled the workers to three each")


def restart_each(project: Project, say: Say) -> int:
    """A rolling restart: one process at a time, asked with SIGTERM; how many were restarted."""
    restarted = 0
    for process in project.running(*PROCESSES):
        process.restart()
        wait_healthy(project)
        restarted += 1
    say(f"restarted {restarted} processes, one after the other")
    return restarted


def upgrade(project: Project, image: str, say: Say) -> None:
    """Recreate everything of ours from another image."""
    before = {container.image for container in project.running(*PROCESSES)}
    project.settings["ASSISTANCE_IMAGE"] = image
    project.compose("up", "--detach")
    wait_healthy(project)
    after = {container.image for container in project.running(*PROCESSES)}
    if after != {image}:
        raise ActFailed(f"the processes run {after} after the upgrade to {image}")
    say(f"upgraded from {', '.join(before)} to {image}")


def wait_until_all_is_delivered(project: Project) -> dict[str, Any]:
    """The books, once nothing waits any more."""

    def settled() -> dict[str, Any] | None:
        try:
            seen = books(project)
        except CommandFailed:
            return None
        return seen if not seen["waiting"] else None

    found: dict[str, Any] | None = wait_until(
        settled,
        "no request waits",
        deadline_seconds=DELIVERED_SECONDS,
        max_pause_seconds=2.0,
        error=ActFailed,
    )
    assert found is not None
    return found


def books(project: Project) -> dict[str, Any]:
    audit = ("python", "-m", "service", "audit", "--full", "--json")
    found: dict[str, Any] = json.loads(project.run_in("service", *audit, check=False) or "{}")
    if not found:
        raise CommandFailed("the audit printed nothing")
    return found


def _wait_restarted(victim: Container) -> None:
    wait_until(
        lambda: victim.refresh().is_running and victim.refresh().started_at != victim.started_at,
        f"{victim.name} is started again",
        deadline_seconds=HEALTHY_SECONDS,
        max_pause_seconds=1.0,
        error=ActFailed,
    )


def _leads(relay: Container) -> bool:
    metrics = run("docker", "exec", relay.id, "python", "-c", READ_METRICS, check=False)
    return "relay_leading 1.0" in metrics.splitlines()
