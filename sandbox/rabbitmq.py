"""RabbitMQ for development and tests: a broker of our own, or one that was given."""

import json
import os
import secrets
import shutil
import subprocess
from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, urlsplit

import httpx
import pika

from sandbox.errors import NotOursError, ServerFailedError
from sandbox.ports import LOOPBACK, free_ports, port_answers, port_is_free
from sandbox.secret_files import remembered, write_secret
from sandbox.server_process import Deadline, ServerProcess

READY_SECONDS = 90
USER = "sandbox"
NODE_NAME = "sandbox@localhost"
MANAGEMENT_PORT = 15672
CONNECTION_SEEN_SECONDS = 15
NEEDED_PLUGINS = (
    "rabbitmq_prelaunch",
    "rabbitmq_management",
    "rabbitmq_management_agent",
    "rabbitmq_web_dispatch",
)

# Test-speed hacks, not how RabbitMQ is run in production.
#
# The management agent's event handler calls Erlang's application controller from its clean-up, and
# waits until its five-second timeout, because the controller is busy stopping the broker (3.10.8).
STOP_STATISTICS = "gen_event:delete_handler(rabbit_event, rabbit_mgmt_db_handler, [])"
# A quorum queue is written to its node's directory on disk only seconds after it was declared. A
# node that is killed before that comes back with a queue that does not respond (3.10.8). Tests that
# kill the broker are about messages in queues, not about that.
WRITE_QUEUE_DIRECTORY = "[dets:sync(Table) || Table <- dets:all()]"


@dataclass
class RabbitServer(ABC):
    """A broker: `url` is `amqp://user:password@host:port/`, `management_url` its HTTP API."""

    url: str = field(init=False, repr=False)
    management_url: str = field(init=False)

    @abstractmethod
    def launch(self) -> None:
        """Start it and return at once."""

    @abstractmethod
    def wait_ready(self) -> None:
        """Return when AMQP and the management API answer; raises ServerFailedError."""

    def start(self) -> None:
        self.launch()
        self.wait_ready()

    def restart(self) -> None:
        self.stop()
        self.start()

    @abstractmethod
    def stop(self) -> None:
        """End it in good order; data and ports are kept for the next start."""

    @abstractmethod
    def kill(self) -> None:
        """SIGKILL."""

    @abstractmethod
    def discard(self) -> None:
        """End it at once; what it holds is not wanted any more."""

    def create_vhost(self, name: str) -> str:
        """Make a virtual host with all rights in it for our user; returns its AMQP URL."""
        user = urlsplit(self.url).username
        self._manage("PUT", f"vhosts/{quote(name, safe='')}")
        everything = {"configure": ".*", "write": ".*", "read": ".*"}
        self._manage("PUT", f"permissions/{quote(name, safe='')}/{user}", json=everything)
        return self.url_of(name)

    def take_rights_away(self, vhost: str) -> None:
        """Leave our user none in it; `create_vhost` gives them again."""
        user = urlsplit(self.url).username
        self._manage("DELETE", f"permissions/{quote(vhost, safe='')}/{user}")

    def permit_topics(self, vhost: str, exchange: str, pattern: str) -> None:
        """Let our user write to this exchange with routing keys that match the pattern only."""
        user = urlsplit(self.url).username
        rights = {"exchange": exchange, "write": pattern, "read": ".*"}
        self._manage("PUT", f"topic-permissions/{quote(vhost, safe='')}/{user}", json=rights)

    def permit_writes(self, vhost: str, pattern: str) -> None:
        """Let our user write to exchanges and queues that match the pattern only."""
        user = urlsplit(self.url).username
        rights = {"configure": ".*", "write": pattern, "read": ".*"}
        self._manage("PUT", f"permissions/{quote(vhost, safe='')}/{user}", json=rights)

    def limit_connections(self, vhost: str, count: int) -> None:
        """Refuse connections above this number; -1 for no limit."""
        limit = f"vhost-limits/{quote(vhost, safe='')}/max-connections"
        self._manage("PUT", limit, json={"value": count})

    def set_policy(
        self, vhost: str, name: str, pattern: str, definition: dict[str, object]
    ) -> None:
        policy = f"policies/{quote(vhost, safe='')}/{quote(name, safe='')}"
        self._manage(
            "PUT", policy, json={"pattern": pattern, "definition": definition, "apply-to": "queues"}
        )

    def delete_vhost(self, name: str) -> None:
        self._manage("DELETE", f"vhosts/{quote(name, safe='')}")

    def url_of(self, vhost: str) -> str:
        return f"{self.url.rstrip('/')}/{quote(vhost, safe='')}"

    def queue_depth(self, vhost: str, queue: str) -> int:
        """Count the messages ready for delivery, exactly and now.

        Asked over AMQP: the management API's figures are up to five seconds old.
        """
        connection = pika.BlockingConnection(pika.URLParameters(self.url_of(vhost)))
        try:
            declared = connection.channel().queue_declare(queue, passive=True)
            return int(declared.method.message_count)
        finally:
            connection.close()

    def close_connections(self, vhost: str, reason: str) -> None:
        """Close every connection in a virtual host from the broker's side.

        There must be one, and it is waited for: the management API knows a connection only after
        five seconds. Raises ServerFailedError when none appears.
        """
        deadline = Deadline.after(CONNECTION_SEEN_SECONDS, "The management API")
        listing = f"vhosts/{quote(vhost, safe='')}/connections"
        while not (connections := self._manage("GET", listing).json()):
            deadline.rest(f"no connection in {vhost}")
        for connection in connections:
            self._manage(
                "DELETE",
                f"connections/{quote(connection['name'], safe='')}",
                headers={"X-Reason": reason},
            )

    def _manage(
        self,
        method: str,
        path: str,
        *,
        json: object = None,
        headers: dict[str, str] | None = None,
    ) -> httpx.Response:
        parts = urlsplit(self.url)
        response = httpx.request(
            method,
            f"{self.management_url}/api/{path}",
            auth=(parts.username or "", parts.password or ""),
            json=json,
            headers=headers,
            timeout=30,
        )
        return response.raise_for_status()

    def management_answers(self) -> bool:
        try:
            self._manage("GET", "whoami")
        except httpx.HTTPError:
            return False
        return True


#: Its schedulers do not spin while they wait: the processors are shared with everybody else here.
#: https://www.rabbitmq.com/docs/runtime#cpu
ERLANG_ARGUMENTS = (
    "-kernel inet_dist_use_interface {127,0,0,1} +sbwt none +sbwtdcpu none +sbwtdio none"
)


@dataclass
class LocalRabbit(RabbitServer):
    """A node of our own from an installed RabbitMQ, with an epmd of its own.

    `server_script` is the one beside `rabbitmq-env`: as root, the wrapper in /usr/sbin would switch
    to a user who cannot write to our folder.
    """

    server_script: Path
    folder: Path
    node: ServerProcess = field(init=False)
    epmd: ServerProcess = field(init=False)

    def __post_init__(self) -> None:
        kept = remembered(
            self.folder / "settings.json",
            lambda: {
                "ports": free_ports(4),
                "password": secrets.token_urlsafe(24),
                "cookie": secrets.token_hex(32),
            },
        )
        self.ports: list[int] = kept["ports"]
        self.amqp_port, self.management_port, self.distribution_port, self.epmd_port = self.ports
        self.password: str = kept["password"]
        self.cookie: str = kept["cookie"]
        self.url = f"amqp://{USER}:{self.password}@{LOOPBACK}:{self.amqp_port}/"
        self.management_url = f"http://{LOOPBACK}:{self.management_port}"
        # Started by us, in the foreground, so that it is ours to end: the node would start one
        # that stays behind, listening on every address.
        self.epmd = ServerProcess(
            "epmd",
            ["epmd", "-address", LOOPBACK, "-port", str(self.epmd_port)],
            self.folder / "epmd.log",
        )
        self.node = ServerProcess(
            "RabbitMQ",
            [str(self.scripts / self.server_script.name)],
            self.folder / "rabbitmq.log",
            self._environment(),
        )

    @property
    def scripts(self) -> Path:
        return self.folder / "installation" / "sbin"

    def _write_configuration(self) -> None:
        settings = {
            "listeners.tcp.1": f"{LOOPBACK}:{self.amqp_port}",
            "management.tcp.ip": LOOPBACK,
            "management.tcp.port": self.management_port,
            "default_user": USER,
            "default_pass": self.password,
            "default_user_tags.administrator": "true",
            "log.console": "true",
            "log.console.level": "info",
            "log.file": "false",
        }
        lines = [f"{name} = {value}\n" for name, value in settings.items()]
        write_secret(self.folder / "rabbitmq.conf", "".join(lines))
        write_secret(self.folder / ".erlang.cookie", self.cookie)
        (self.folder / "advanced.config").write_text("[].\n")
        (self.folder / "rabbitmq-env.conf").write_text("")
        (self.folder / "enabled_plugins").write_text("[rabbitmq_management].\n")

    def _environment(self) -> dict[str, str]:
        folder = self.folder
        return {
            "PATH": os.environ["PATH"],
            "LANG": "C.UTF-8",
            "HOME": str(folder),  # where Erlang looks for its cookie
            "ERL_CRASH_DUMP": str(folder / "erl_crash.dump"),
            "RABBITMQ_SCRIPTS_DIR": str(self.scripts),
            "RABBITMQ_NODENAME": NODE_NAME,
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(folder / "advanced.config"),
            "RABBITMQ_CONF_ENV_FILE": str(folder / "rabbitmq-env.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": str(folder / "data"),
            "RABBITMQ_LOG_BASE": str(folder / "log"),
            "RABBITMQ_DIST_PORT": str(self.distribution_port),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": ERLANG_ARGUMENTS,
            "ERL_EPMD_ADDRESS": LOOPBACK,
            "ERL_EPMD_PORT": str(self.epmd_port),
            # The script then becomes the node instead of staying above it, so that our signals
            # reach the node itself.
            "RUNNING_UNDER_SYSTEMD": "true",
        }

    def launch(self) -> None:
        if not self.node.running:
            self._check_ports()
            self._write_configuration()
            mirror(self.server_script.parents[1], self.folder / "installation")
        self.epmd.launch()
        self.node.launch()

    def _check_ports(self) -> None:
        ours = {self.epmd_port} if self.epmd.running else set()
        for port in set(self.ports) - ours:
            if not port_is_free(port):
                raise ServerFailedError(
                    f"Port {port} of the local RabbitMQ is taken: end what listens there (another"
                    f" run on the same folder?), or remove {self.folder} to start afresh."
                )

    def wait_ready(self) -> None:
        deadline = Deadline.after(READY_SECONDS, "RabbitMQ")
        while not port_answers(self.amqp_port):
            deadline.rest(f"port {self.amqp_port} does not answer", self.node, self.epmd)
        while not self.management_answers():
            deadline.rest("the management API does not answer", self.node, self.epmd)

    def stop(self) -> None:
        self._evaluate_if_it_answers(STOP_STATISTICS)
        self.node.stop()
        self.epmd.stop()

    def restart(self) -> None:
        """Stop and start the broker inside its running Erlang VM, which saves the VM's own start.

        Clients see what they see of any restart. For the whole process: `stop` and `start`.
        """
        if self.node.running:
            self.evaluate(f"{STOP_STATISTICS}, rabbit:stop(), rabbit:start()")
            self.wait_ready()
        else:
            self.start()

    def kill(self) -> None:
        """SIGKILL of the node; epmd stays for the next start, as it does in production."""
        self._evaluate_if_it_answers(WRITE_QUEUE_DIRECTORY)
        self.node.kill()

    def discard(self) -> None:
        self.node.kill()
        self.epmd.kill()

    def close_connections(self, vhost: str, reason: str) -> None:
        """Close every connection in a virtual host from the broker's side; there may be none."""
        connections = f"rabbit_connection_tracking:list(<<{json.dumps(vhost)}>>)"
        self.evaluate(
            "rabbit_connection_tracking:close_connections"
            f"({connections}, <<{json.dumps(reason)}>>, 0)"
        )

    def _evaluate_if_it_answers(self, expression: str) -> None:
        with suppress(ServerFailedError):
            self.evaluate(expression)

    def evaluate(self, expression: str) -> str:
        """Evaluate an Erlang expression in the node; returns the result as Erlang prints it.

        Test-speed hack: takes milliseconds, where rabbitmqctl starts a VM for each call. Raises
        ServerFailedError.
        """
        answer = subprocess.run(
            [str(erl_call()), "-sname", NODE_NAME, "-e"],
            input=f"{expression}.\n",
            env=self._environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        said = answer.stdout.strip()
        if not said.startswith("{ok,"):
            raise ServerFailedError(
                f"RabbitMQ would not evaluate {expression}: {said}{answer.stderr}"
            )
        return said.removeprefix("{ok,").removesuffix("}").strip()


def mirror(installation: Path, folder: Path) -> None:
    """Test-speed hack: link to an installation of RabbitMQ without the plugins that we do not use.

    It starts in two thirds of the time [M]: Erlang looks for each of a thousand modules in the
    folders of all plugins, and RabbitMQ reads the description of each.
    """
    if folder.exists():
        shutil.rmtree(folder)
    (folder / "plugins").mkdir(parents=True)
    for part in installation.iterdir():
        if part.name != "plugins":
            (folder / part.name).symlink_to(part)
    for library in (installation / "plugins").iterdir():
        name = library.name.partition("-")[0]
        if name in NEEDED_PLUGINS or not name.startswith("rabbitmq_"):
            (folder / "plugins" / library.name).symlink_to(library)


def erl_call() -> Path:
    """Find Erlang's `erl_call`, beside its VM."""
    erl = shutil.which("erl")
    assert erl is not None
    return next(Path(erl).resolve().parents[1].glob("erts-*/bin/erl_call"))


@dataclass
class GivenRabbit(RabbitServer):
    """An external broker, given by a URL: used, never started, stopped or damaged.

    The user of `given_url` needs the administrator tag, and the management plugin must be on.
    """

    given_url: str = field(repr=False)
    given_management_url: str | None = None

    def __post_init__(self) -> None:
        parts = urlsplit(self.given_url)
        self.url = self.given_url
        self.management_url = (
            self.given_management_url or f"http://{parts.hostname}:{MANAGEMENT_PORT}"
        ).rstrip("/")

    def launch(self) -> None:
        """Nothing to start."""

    def wait_ready(self) -> None:
        deadline = Deadline.after(READY_SECONDS, "The broker at RABBITMQ_URL")
        while not self.management_answers():
            deadline.rest(
                f"its management API does not answer at {self.management_url}"
                " (RABBITMQ_MANAGEMENT_URL names another place)"
            )

    def stop(self) -> None:
        """Not ours to stop."""

    discard = stop

    def kill(self) -> None:
        raise NotOursError("RABBITMQ_URL")
