"""
`python -m tests.compatibility`: the relay's, delivery's and whole path's tests over the versions.

Servers run from the images that deploy/offline/stand-ins builds; `RABBITMQ=4.3 MONGODB=6.0.5` picks
one pair. The lines that it prints are those of docs/compatibility.md.
"""

import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import dataclass

from tests.support.paths import REPOSITORY

STAND_INS = REPOSITORY / "deploy" / "offline" / "stand-ins"
RABBITMQ = ("3.10", "4.0", "4.3")
MONGODB = ("6.0.5", "6.0.27")
TESTS = ("tests/relay", "tests/delivery", "tests/system/test_whole_path.py")
OUTCOMES = re.compile(r"(\d+) (passed|failed|error)")


@dataclass(frozen=True)
class Pair:
    rabbitmq: str
    mongodb: str

    @property
    def images(self) -> dict[str, str]:
        return {
            "RABBITMQ_IMAGE": f"assistance-offline/rabbitmq:{self.rabbitmq}-management",
            "MONGODB_IMAGE": f"assistance-offline/mongo:{self.mongodb}",
        }


def main() -> None:
    pairs = [
        Pair(rabbitmq, mongodb)
        for rabbitmq in _chosen("RABBITMQ", RABBITMQ)
        for mongodb in _chosen("MONGODB", MONGODB)
    ]
    names = {f"rabbitmq-{pair.rabbitmq}" for pair in pairs} | {
        f"mongo-{pair.mongodb}" for pair in pairs
    }
    subprocess.run([STAND_INS, *sorted(names)], check=True)
    failed = [pair for pair in pairs if not run(pair)]
    sys.exit(f"{len(failed)} of {len(pairs)} pairs failed" if failed else 0)


def run(pair: Pair) -> bool:
    """Run the tests on one pair, and print its line of the table; whether all of them passed."""
    started = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "2", *TESTS],
        cwd=REPOSITORY,
        env={**os.environ, **pair.images},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if ended.returncode:
        sys.stdout.write(ended.stdout)
    last = ended.stdout.splitlines()[-1] if ended.stdout else ""
    counts = {word: number for number, word in OUTCOMES.findall(last)}
    sys.stdout.write(
        f"| {pair.rabbitmq} | {pair.mongodb} | {platform.python_version()} | "
        f"{counts.get('passed', 0)} | {counts.get('failed', 0)} | "
        f"{time.monotonic() - started:.0f} |\n"
    )
    sys.stdout.flush()
    return ended.returncode == 0


def _chosen(variable: str, known: tuple[str, ...]) -> tuple[str, ...]:
    chosen = os.environ.get(variable)
    if chosen and chosen not in known:
        sys.exit(f"{variable}={chosen} is unknown; known: {', '.join(known)}")
    return (chosen,) if chosen else known


if __name__ == "__main__":
    main()
