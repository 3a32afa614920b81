"""The whole system on one machine: both servers, every process, and third parties to call."""

import os
import secrets
import subprocess
import sys
import tempfile
import xmlrpc.client
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pika
from pymongo import MongoClient
from supervisor.xmlrpc import SupervisorTransport

from sandbox.ports import LOOPBACK, free_ports
from sandbox.secret_files import remembered, write_secret
from sandbox.server_process import Deadline, leash, let_go
from sandbox.servers import Servers, open_servers

READY_SECONDS = 60
#: Not the product's defaults: a server that is given may have the real thing on it.
DATABASE = "assistance_demo"
VHOST = "assistance_demo"

QUEUES = ("deliveries.slack", "deliveries.email", "deliveries.webhook", "dead-letters")

PROCESSES = {
    "third-parties": "-m sandbox.third_parties",
    "service": "-m service run",
    "relay": "-m relay run",
    "slack": "-m consumers run slack",
    "email": "-m consumers run email",
    "webhook": "-m consumers run webhook",
    "dead-letters": "-m consumers run dead-letters",
    "reconciler": "-m consumers run reconciler",
}

#: A demo has no six hours to wait. Everything else is as in production.
SHORT_SCHEDULE = {
    "RETRY_DELAYS_SECONDS": "2,4,8,15,30,60,120",
    "CALL_TIMEOUT_SECONDS": "3",
    "LEASE_MARGIN_SECONDS": "2",
    "BREAKER_FIRST_WAIT_SECONDS": "1",
    # nor a person to ask about lost answers
    "DESTINATION_SLACK_ON_UNKNOWN": "repeat",
    "DESTINATION_EMAIL_ON_UNKNOWN": "repeat",
    # the sandbox's Slack bears any rate
    "DESTINATION_SLACK_RATE_PER_SECOND": "0",
}

Say = Callable[[str], None]


@dataclass(frozen=True)
class Stack:
    """
    The running system. `api` sends the key with each call; `third_parties` controls them.

    epoch_before: the last relay's, before this start; 0 where there was none.
    settings: what `environment` adds to the environment of this process.
    """

    folder: Path
    servers: Servers
    epoch_before: int
    settings: dict[str, str]
    environment: dict[str, str]
    supervisor: Any
    api: httpx.Client
    api_key: str
    third_parties: httpx.Client

    def kill(self, name: str) -> None:
        """SIGKILL; the supervisor starts it again, as it would in production."""
        self.supervisor.signalProcess(name, "KILL")

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run one of the product's commands to its end, with the stack's settings."""
        return subprocess.run(
            [sys.executable, "-m", *arguments],
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )

    def wait_ready(self) -> None:
        deadline = Deadline.after(READY_SECONDS, f"The system (logs in {self.folder / 'logs'})")
        for name, is_ready in self._signs_of_readiness().items():
            while not is_ready():
                deadline.rest(f"{name} is not ready")

    def _signs_of_readiness(self) -> dict[str, Callable[[], bool]]:
        return {
            "third-parties": lambda: _answers(self.third_parties, "/livez"),
            "service": lambda: _answers(self.api, "/readyz"),
            "relay": self._relay_leads,
            **{queue: lambda queue=queue: self._is_consumed(queue) for queue in QUEUES},  # type: ignore[misc]
            "reconciler": lambda: self._is_running("reconciler"),
        }

    def _relay_leads(self) -> bool:
        checkpoint = _checkpoint(self.servers)
        return (
            checkpoint.get("epoch", 0) > self.epoch_before
            and bool(checkpoint.get("position"))
            and not checkpoint.get("handover")
        )

    def _is_consumed(self, queue: str) -> bool:
        connection = pika.BlockingConnection(pika.URLParameters(self.environment["RABBITMQ_URL"]))
        try:
            declared = connection.channel().queue_declare(queue, passive=True)
            return bool(declared.method.consumer_count)
        finally:
            connection.close()

    def _is_running(self, name: str) -> bool:
        return bool(self.supervisor.getProcessInfo(name)["statename"] == "RUNNING")


def _checkpoint(servers: Servers) -> dict[str, Any]:
    with MongoClient[dict[str, Any]](servers.mongo.url) as client:
        return client[DATABASE]["checkpoints"].find_one() or {}


def _answers(client: httpx.Client, path: str) -> bool:
    try:
        return client.get(path).is_success
    except httpx.TransportError:
        return False


@contextmanager
def open_stack(folder: Path, say: Say) -> Iterator[Stack]:
    """
    Start everything, from the servers to the last worker; stop it in the opposite order.

    What runs here runs in `folder`, an absolute path: a `.env` in the checkout is not for it.
    """
    say("Starting MongoDB and RabbitMQ ...")
    with open_servers(folder) as servers:
        kept = remembered(
            folder / "stack.json",
            lambda: {
                "api_key": secrets.token_urlsafe(24),
                "slack_token": secrets.token_urlsafe(18),
                "ports": free_ports(5),
            },
        )
        servers.rabbit.create_vhost(VHOST)
        settings = _settings(servers, kept)
        environment = os.environ | settings
        epoch_before = _checkpoint(servers).get("epoch", 0)
        say("Declaring exchanges and queues ...")
        subprocess.run(
            [sys.executable, "-m", "consumers", "topology"],
            env=environment,
            cwd=folder,
            stdout=subprocess.DEVNULL,
            check=True,
        )
        say(f"Starting {', '.join(PROCESSES)} ...")
        api_port, page_port = kept["ports"][:2]
        with (
            _supervised(folder, environment, kept["ports"]) as supervisor,
            httpx.Client(
                base_url=f"http://{LOOPBACK}:{api_port}",
                headers={"X-API-KEY": kept["api_key"]},
                timeout=30,
                trust_env=False,
            ) as api,
            httpx.Client(base_url=f"http://{LOOPBACK}:{page_port}", trust_env=False) as parties,
        ):
            stack = Stack(
                folder,
                servers,
                epoch_before,
                settings,
                environment,
                supervisor,
                api,
                kept["api_key"],
                parties,
            )
            stack.wait_ready()
            yield stack
            say("Stopping ...")


def _settings(servers: Servers, kept: dict[str, Any]) -> dict[str, str]:
    api_port, _page_port, slack_port, webhook_port, smtp_port = kept["ports"]
    return {
        "DESTINATIONS": '{"slack": "slack", "email": "email", "webhook": "webhook"}',
        "ROUTES": '{"sales": ["slack"], "pricing": ["email"], "stock": ["webhook"]}',
        "MONGODB_URL": servers.mongo.url,
        "MONGODB_DATABASE": DATABASE,
        "RABBITMQ_URL": urlsplit(servers.rabbit.url)._replace(path=f"/{VHOST}").geturl(),
        "API_KEYS": kept["api_key"],
        "API_PORT": str(api_port),
        "SLACK_WEBHOOK_URL": f"http://{LOOPBACK}:{slack_port}/services/T0/B0/{kept['slack_token']}",
        # a real token in the environment is not for the sandbox
        "SLACK_TOKEN": "",
        "SLACK_CHANNEL": "",
        "WEBHOOK_URL": f"http://{LOOPBACK}:{webhook_port}/webhooks/stock",
        "WEBHOOK_SIGNING_SECRETS": f"whsec_{b64encode(kept['slack_token'].encode()).decode()}",
        "WEBHOOK_ALLOWED_NETWORKS": f"{LOOPBACK}/32",
        "EMAIL_SMTP_HOST": LOOPBACK,
        "EMAIL_SMTP_PORT": str(smtp_port),
        "EMAIL_SMTP_TLS": "none",
        "EMAIL_SENDER": "assistance@example.org",
        "EMAIL_RECIPIENTS": "pricing@example.org",
        "LOG_FORMAT": "json",
        **SHORT_SCHEDULE,
    }


@contextmanager
def _supervised(folder: Path, environment: dict[str, str], ports: list[int]) -> Iterator[Any]:
    """Every process under supervisord, which restarts what dies and ends with this process."""
    logs = folder / "logs"
    logs.mkdir(exist_ok=True)
    # a socket's path may have 108 characters only, and a checkout may lie deep
    with tempfile.TemporaryDirectory(prefix="assistance-") as short_folder:
        socket = Path(short_folder, "supervisor.sock")
        configuration = folder / "supervisord.conf"
        write_secret(configuration, _configuration(logs, socket, ports))
        with (logs / "supervisord.log").open("ab") as log:
            daemon = subprocess.Popen(
                [sys.executable, "-m", "supervisor.supervisord", "-n", "-c", str(configuration)],
                env=environment,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        held = leash("kill", "-TERM", str(daemon.pid))
        deadline = Deadline.after(READY_SECONDS, "supervisord")
        try:
            while not socket.exists():
                deadline.rest(f"no socket yet (log in {logs})")
            transport = SupervisorTransport(None, None, serverurl=f"unix://{socket}")
            yield xmlrpc.client.ServerProxy("http://local", transport).supervisor
        finally:
            daemon.terminate()
            daemon.wait()
            let_go(held)


def _configuration(logs: Path, socket: Path, ports: list[int]) -> str:
    _api_port, page_port, slack_port, webhook_port, smtp_port = ports
    listening = (
        f" --http-port {page_port} --slack-port {slack_port}"
        f" --webhook-port {webhook_port} --smtp-port {smtp_port}"
    )
    lines = [
        "[supervisord]",
        f"logfile={logs / 'supervisord.log'}",
        f"pidfile={socket.with_name('supervisord.pid')}",
        f"[unix_http_server]\nfile={socket}\nchmod=0700",
        "[rpcinterface:supervisor]",
        "supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface",
    ]
    for name, command in PROCESSES.items():
        lines += [
            f"[program:{name}]",
            f"command={sys.executable} {command}{listening if name == 'third-parties' else ''}",
            f"stdout_logfile={logs / name}.log",
            "redirect_stderr=true",
            "stopwaitsecs=30",
            "autorestart=true",
        ]
    return "\n".join(lines) + "\n"
