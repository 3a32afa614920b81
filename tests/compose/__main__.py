"""
`python -m tests.compose`: the whole campaign; the last line is the balance of the books.

`python -m tests.compose remove NAME`: remove what a campaign of that name has left behind.
"""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

from sandbox.ports import free_ports
from sandbox.server_process import leash, let_go
from tests.compose import acts
from tests.compose.acts import ActFailed
from tests.compose.engine import OFFLINE, CommandFailed, Project, engine_answers, run
from tests.compose.load import Load
from tests.support.paths import REPOSITORY

EXIT_UNAVAILABLE = 69
EXIT_INTERRUPTED = 130

#: The first commit whose Dockerfile has this is the oldest that can be upgraded from.
OLDEST = "FROM ${PYTHON_IMAGE} AS product"

STARTED_AT = time.monotonic()


def say(line: str) -> None:
    sys.stdout.write(f"{time.monotonic() - STARTED_AT:4.0f} s  {line}\n")
    sys.stdout.flush()


def main() -> None:
    # SIGTERM cleans up as Ctrl-C does
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if sys.argv[1:2] == ["remove"]:
        remove(sys.argv[2])
        return
    version = engine_answers()
    if version is None:
        sys.exit("compose-test: no Docker engine answers; start one, or set DOCKER_HOST")
    if os.geteuid():
        sys.exit("compose-test: run it as root: it kills the processes of containers")
    try:
        say(f"Docker engine {version}; stand-ins and wheels:")
        run_visibly(str(OFFLINE / "stand-ins"))
        run_visibly(str(REPOSITORY / "deploy" / "image" / "prepare"), PYTHON=sys.executable)
        with project_of_its_own() as (project, images):
            balance = campaign(project, images)
        say("nothing of it is left in the engine")
        sys.stdout.write(f"{balance}\n")
    except KeyboardInterrupt:
        say("stopped; nothing of it is left in the engine")
        sys.exit(EXIT_INTERRUPTED)
    except (ActFailed, CommandFailed, httpx.HTTPError) as failure:
        sys.exit(f"\ncompose-test: {failure}")


@contextmanager
def project_of_its_own() -> Iterator[tuple[Project, list[str]]]:
    """A project with a name, ports and images of its own; all of it is removed, however it ends."""
    name = f"assistance-test-{secrets.token_hex(3)}"
    project, images = open_project(name)
    # for an end that nobody can catch
    held = leash(sys.executable, "-m", "tests.compose", "remove", name)
    try:
        yield project, images
    except BaseException:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if project.running():
            show_logs(project)
        raise
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        project.remove(images)
        let_go(held)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if left := project.leftovers(images):
            raise ActFailed(f"left in the engine: {', '.join(left)}")


def open_project(name: str) -> tuple[Project, list[str]]:
    new, old, sandbox = (f"{name}:{tag}" for tag in ("new", "old", "sandbox"))
    api, inbox, pages = free_ports(3)
    settings = {
        "ASSISTANCE_IMAGE": new,
        "SANDBOX_IMAGE": sandbox,
        "API_PORT": str(api),
        "INBOX_PORT": str(inbox),
        "RABBITMQ_PAGES_PORT": str(pages),
        # a campaign has no six hours to wait, and the sandbox's Slack bears any rate
        "RETRY_DELAYS_SECONDS": "1,2,4,8,15,30,60,120",
        "CALL_TIMEOUT_SECONDS": "5",
        "BREAKER_FIRST_WAIT_SECONDS": "1",
        "BREAKER_LONGEST_WAIT_SECONDS": "5",
        "DESTINATION_SLACK_RATE_PER_SECOND": "0",
    }
    compose = run(str(OFFLINE / "compose")).strip()
    return Project(name, compose, settings), [new, old, sandbox]


def remove(name: str) -> None:
    project, images = open_project(name)
    project.remove(images)


def campaign(project: Project, images: list[str]) -> str:
    new, old, _sandbox = images
    commit = build_old(old)
    say(f"built the image of {commit[:12]}, to upgrade from")
    # one after the other: the second finds the first one's layers
    project.compose("build", "secrets")
    project.compose("build", "third-parties")
    size = int(run("docker", "image", "inspect", "--format", "{{.Size}}", new))
    say(f"built compose.yml's images ({size / 1e6:.0f} MB)")

    project.settings["ASSISTANCE_IMAGE"] = old
    before = listening()
    project.compose("up", "--detach")
    acts.wait_healthy(project)
    say("docker compose up: every container is healthy")
    listens_on_loopback_only(project, before)
    (third_parties,) = project.running("third-parties")
    third_parties.kill()
    acts.wait_healthy(project, "third-parties")
    say("killed the third parties: back; what they receive counts from now on")

    api_url = f"http://127.0.0.1:{project.settings['API_PORT']}"
    key = project.run_in("service", "cat", "/run/secrets/api-keys").strip()
    killed, restarted = 1, 0
    with Load(api_url, key) as load:
        acts.upgrade(project, new, say)
        killed += acts.kill_each(project, say)
        acts.cut_network_of_leader(project, say)
        acts.scale_workers(project, say)
        restarted += acts.restart_each(project, say)
    say(
        f"posted {len(load.accepted)} requests meanwhile; refused answers: {load.refused or 'none'}"
    )

    found = acts.wait_until_all_is_delivered(project)
    keeps_data_and_secrets(project, key, found)
    return verdict(project, load, found, killed=killed, restarted=restarted)


def build_old(image: str) -> str:
    """Build the product of an older commit: that of the last release, or the oldest that can be."""
    tag = run("git", "describe", "--tags", "--abbrev=0", check=False).strip()
    log = ("git", "log", "--reverse", "--format=%H", f"-S{OLDEST}", "--", "Dockerfile")
    commit = tag or next(iter(run(*log).split()), "")
    if not commit:
        raise CommandFailed("no older commit is in this clone's history to upgrade from")
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(
            ["git", "archive", commit], cwd=REPOSITORY, capture_output=True, check=True
        )
        subprocess.run(["tar", "--extract"], cwd=folder, input=archive.stdout, check=True)
        wheels = Path("deploy", "image", "wheels")
        locks = ("requirements.lock", "deploy/image/build.lock", "deploy/image/sandbox.lock")
        if all(same_file(Path(folder, lock), REPOSITORY / lock) for lock in locks):
            shutil.copytree(REPOSITORY / wheels, folder / wheels)
        else:
            run(
                str(Path(folder, "deploy", "image", "prepare")),
                environment={"PYTHON": sys.executable},
            )
        arguments = dict(
            line.split("=", 1)
            for line in (OFFLINE / "environment").read_text().splitlines()
            if "=" in line and not line.startswith("#")
        )
        run(
            *("docker", "build", "--quiet", "--target", "product", "--tag", image),
            *("--network", "none", "--build-arg", "PIP_NO_INDEX=1"),
            *("--build-arg", f"PYTHON_IMAGE={arguments['PYTHON_IMAGE']}", "."),
            folder=Path(folder),
        )
    return commit


def same_file(one: Path, other: Path) -> bool:
    return one.exists() and one.read_bytes() == other.read_bytes()


def listening() -> set[tuple[str, int]]:
    """Addresses beyond loopback on which this machine listens."""
    connections = psutil.net_connections("tcp")
    return {
        (one.laddr.ip, one.laddr.port)
        for one in connections
        if one.status == psutil.CONN_LISTEN
        and one.laddr
        and not one.laddr.ip.startswith("127.")
        and one.laddr.ip != "::1"
    }


def listens_on_loopback_only(project: Project, before: set[tuple[str, int]]) -> None:
    addresses = {address for one in project.running() for address in one.listening_addresses}
    if addresses != {"127.0.0.1"}:
        raise ActFailed(f"ports are published on {addresses}")
    ports = {int(value) for name, value in project.settings.items() if name.endswith("_PORT")}
    if beyond := {(ip, port) for ip, port in listening() - before if port in ports}:
        raise ActFailed(f"this machine listens beyond loopback: {beyond}")
    say("nothing listens beyond loopback")


def keeps_data_and_secrets(project: Project, key: str, found: dict[str, Any]) -> None:
    """Down and up again, the third parties apart: nothing is lost, and the key is the same."""
    project.compose("rm", "--stop", "--force", *acts.PROCESSES, *acts.SERVERS, "secrets", "ready")
    project.compose("up", "--detach")
    acts.wait_healthy(project)
    if project.run_in("service", "cat", "/run/secrets/api-keys").strip() != key:
        raise ActFailed("the API key is another one after a restart")
    again = acts.books(project)
    if again != found:
        raise ActFailed(f"the books were {found} before a restart and are {again} after it")
    say("stopped and started everything of ours: data and secrets are the same")


def verdict(
    project: Project, load: Load, found: dict[str, Any], *, killed: int, restarted: int
) -> str:
    """The balance, compared with what the third parties have. Raises ActFailed."""
    received = received_requests(int(project.settings["INBOX_PORT"]))
    lost = set(load.accepted) - received
    lines = project.run_in("service", "python", "-m", "service", "audit", "--full", check=False)
    ready = project.compose("logs", "--no-log-prefix", "ready")
    problems = [
        f"{len(lost)} accepted requests never reached a third party" if lost else "",
        f"{found['failed']} requests failed" if found["failed"] else "",
        f"{found['unexplained']} requests are unexplained" if found["unexplained"] else "",
        "" if found["accepted"] == len(load.accepted) else "the books hold another number",
        "" if "API key" in ready else "the service `ready` did not say where everything is",
    ]
    if any(problems):
        raise ActFailed("; ".join(filter(None, [*problems, lines])))
    return (
        f"killed {killed} containers, cut 1 network, restarted {restarted}, upgraded 1 time: "
        f"posted {len(load.accepted)}, delivered {len(received & set(load.accepted))}, "
        f"failed {found['failed']}, lost {len(lost)} "
        "(on stand-ins: MongoDB 6.0.5, RabbitMQ 4.3)"
    )


def received_requests(port: int) -> set[str]:
    answer = httpx.get(
        f"http://127.0.0.1:{port}/inbox",
        params={"limit": 10_000, "accepted": True},
        trust_env=False,
        timeout=30,
    )
    return {receipt["request_id"] for receipt in answer.raise_for_status().json()["receipts"]}


def show_logs(project: Project) -> None:
    """What the containers said last, for whoever looks for the cause."""
    folder = REPOSITORY / ".local" / "compose-test"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "logs").write_text(project.compose("logs", "--no-color", check=False))
    (folder / "ps").write_text(project.compose("ps", "--all", check=False))
    say(f"the logs are in {folder}")


def run_visibly(*command: str, **environment: str) -> None:
    ended = subprocess.run(
        command, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, check=False
    )
    if ended.returncode:
        raise CommandFailed(f"{command[0]}: exit code {ended.returncode}")


if __name__ == "__main__":
    main()
