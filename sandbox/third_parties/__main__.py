"""Run all third parties until SIGTERM or Ctrl-C; ports that are not given are chosen freely."""

import argparse
import asyncio
import signal
import sys

from sandbox.third_parties.control import control_app
from sandbox.third_parties.listener import LOOPBACK, http_listener
from sandbox.third_parties.parties import ThirdParties


def main() -> None:
    ports = _read_ports()
    try:
        asyncio.run(_run(ports))
    except OSError as error:
        sys.exit(f"third parties cannot listen on {error.strerror}; choose another port (--help)")


async def _run(ports: argparse.Namespace) -> None:
    stop = asyncio.Event()
    for asked_to_stop in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(asked_to_stop, stop.set)

    parties = ThirdParties(
        slack_port=ports.slack_port,
        webhook_port=ports.webhook_port,
        smtp_port=ports.smtp_port,
        host=ports.host,
    )
    page = http_listener(ports.http_port, control_app(parties), host=ports.host)
    await parties.open()
    await page.open()
    _say_ready({"page": f"http://{LOOPBACK}:{page.port}/", **parties.addresses})

    await stop.wait()
    page.give_up_port()
    await parties.close()


def _say_ready(addresses: dict[str, str]) -> None:
    named = " ".join(f"{name}={address}" for name, address in addresses.items())
    print(f"third parties ready: {named}", flush=True)


def _read_ports() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m sandbox.third_parties", description=__doc__)
    parser.add_argument(
        "--host", default=LOOPBACK, help="address to listen on; another only in a container"
    )
    parser.add_argument("--http-port", type=port_number, default=0, help="page, inbox and control")
    parser.add_argument("--slack-port", type=port_number, default=0, help="Slack")
    parser.add_argument("--webhook-port", type=port_number, default=0, help="webhook receiver")
    parser.add_argument("--smtp-port", type=port_number, default=0, help="mail server")
    return parser.parse_args()


def port_number(text: str) -> int:
    port = int(text)
    if port not in range(65536):
        raise argparse.ArgumentTypeError(f"{text} is not a port: 0 to 65535")
    return port


if __name__ == "__main__":
    main()
