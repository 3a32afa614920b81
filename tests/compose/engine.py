"""The Docker engine and Compose, as commands; every name that they make carries the project's."""

import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from sandbox.waiting import wait_until
from tests.support.paths import REPOSITORY

OFFLINE = REPOSITORY / "deploy" / "offline"
STAGE = "label=assistance-relay.stage=build"

#: A build on two busy cores takes two minutes.
COMMAND_SECONDS = 900


class CommandFailed(Exception):
    """A command of docker or Compose failed; the message holds its last lines."""


def run(
    *command: str,
    environment: Mapping[str, str] | None = None,
    folder: Path = REPOSITORY,
    check: bool = True,
) -> str:
    """What the command prints. Raises CommandFailed."""
    ended = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "DOCKER_BUILDKIT": "0", **(environment or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=COMMAND_SECONDS,
        check=False,
        # Ctrl-C is ours: a command that is half-way would leave things behind
        start_new_session=True,
    )
    if check and ended.returncode:
        last = "\n".join((ended.stdout + ended.stderr).splitlines()[-25:])
        raise CommandFailed(f"{' '.join(command)}: exit code {ended.returncode}\n{last}")
    return ended.stdout


def engine_answers() -> str | None:
    """The engine's version; None where there is no engine."""
    try:
        return run("docker", "version", "--format", "{{.Server.Version}}").strip() or None
    except (OSError, CommandFailed):
        return None


class Project:
    """One Compose project of the repository's compose.yml."""

    def __init__(self, name: str, compose: str, settings: Mapping[str, str]) -> None:
        self.name = name
        self._compose = compose
        self.settings = dict(settings)

    def compose(self, *arguments: str, check: bool = True) -> str:
        files = ("--env-file", str(OFFLINE / "environment"), "--project-name", self.name)
        return run(self._compose, *files, *arguments, environment=self.settings, check=check)

    def containers(self, *services: str) -> list["Container"]:
        """Those that exist, steps that have ended too; by name."""
        ids = run("docker", "ps", "--all", "--quiet", "--filter", self._label).split()
        documents = json.loads(run("docker", "inspect", *ids)) if ids else []
        found = [Container(document) for document in documents]
        return sorted(
            (one for one in found if not services or one.service in services),
            key=lambda container: container.name,
        )

    def running(self, *services: str) -> list["Container"]:
        return [one for one in self.containers(*services) if one.is_running]

    def run_in(self, service: str, *command: str, check: bool = True) -> str:
        return self.compose("exec", "--no-TTY", service, *command, check=check)

    def remove(self, images: Sequence[str]) -> None:
        """Containers, networks, volumes, and the images that were built for this project."""
        self.compose("down", "--volumes", "--timeout", "1", "--remove-orphans", check=False)
        run("docker", "image", "rm", "--force", *images, check=False)

        def stages_are_gone() -> bool:
            # a build that was interrupted ends a moment later, and leaves its last stage
            run("docker", "image", "prune", "--force", "--filter", STAGE, check=False)
            return not run("docker", "image", "ls", "--quiet", "--filter", STAGE).split()

        with suppress(AssertionError):  # what is left is named by `leftovers`
            wait_until(stages_are_gone, "build stages are removed", deadline_seconds=60)

    def leftovers(self, images: Sequence[str]) -> list[str]:
        """What of this project still exists in the engine."""
        label, left = self._label, []
        for kind, command in {
            "container": ("ps", "--all", "--quiet", "--filter", label),
            "volume": ("volume", "ls", "--quiet", "--filter", label),
            "network": ("network", "ls", "--quiet", "--filter", label),
            "image of a build stage": ("image", "ls", "--quiet", "--filter", STAGE),
        }.items():
            left += [f"{kind} {name}" for name in run("docker", *command).split()]
        present = run("docker", "image", "ls", "--format", "{{.Repository}}:{{.Tag}}").split()
        return left + [f"image {image}" for image in images if image in present]

    @property
    def _label(self) -> str:
        return f"label=com.docker.compose.project={self.name}"


class Container:
    """One container as `docker inspect` showed it."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self._document = document
        self.id: str = document["Id"]
        self.name: str = document["Name"].removeprefix("/")
        self.service: str = document["Config"]["Labels"]["com.docker.compose.service"]
        self.image: str = document["Config"]["Image"]
        self.is_running: bool = document["State"]["Running"]
        self.started_at: str = document["State"]["StartedAt"]
        self.process_id: int = document["State"]["Pid"]

    @property
    def is_healthy(self) -> bool:
        health = self._document["State"].get("Health") or {}
        return self.is_running and health.get("Status") == "healthy"

    @property
    def listening_addresses(self) -> set[str]:
        ports = self._document["NetworkSettings"]["Ports"] or {}
        return {one["HostIp"] for published in ports.values() for one in published or []}

    @property
    def aliases(self) -> Mapping[str, list[str]]:
        """By network."""
        networks = self._document["NetworkSettings"]["Networks"]
        return {name: network["Aliases"] or [] for name, network in networks.items()}

    def refresh(self) -> "Container":
        (document,) = json.loads(run("docker", "inspect", self.id))
        return Container(document)

    def kill(self) -> None:
        """
        End its first process as a crash does, so that the restart policy applies: what
        `docker kill` ends counts as stopped by a person, and stays down.
        """
        os.kill(self.process_id, signal.SIGKILL)

    def disconnect(self, network: str) -> None:
        run("docker", "network", "disconnect", network, self.id)

    def connect(self, network: str, aliases: Sequence[str]) -> None:
        options = [option for alias in aliases for option in ("--alias", alias)]
        run("docker", "network", "connect", *options, network, self.id)

    def restart(self) -> None:
        run("docker", "restart", "--time", "60", self.id)
