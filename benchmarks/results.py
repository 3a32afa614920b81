"""What a run of the benchmark found, as it is kept in JSON."""

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import psutil
from pydantic import TypeAdapter
from pymongo import MongoClient

from benchmarks.ceilings import Ceilings
from benchmarks.drain import Drain
from benchmarks.growth import Growth, Memory
from benchmarks.latency import Latency
from benchmarks.plan import Plan
from benchmarks.whole_way import WholeWay
from sandbox.servers import Servers


@dataclass(frozen=True)
class Machine:
    """load_before: how many processes wanted a core in the minute before; a quiet one has 0."""

    date: str
    cores: int
    memory_gb: float
    system: str
    python: str
    mongodb: str
    rabbitmq: str
    load_before: float


@dataclass(frozen=True)
class Results:
    """
    Lists hold a result a round; round n of one contender ran beside round n of the others.

    latency and offered are by contender, drains and large by contender and way.
    """

    machine: Machine
    plan: Plan
    latency: dict[str, list[Latency]]
    offered: dict[str, list[Latency]]
    drains: dict[str, list[Drain]]
    large: dict[str, list[Drain]]
    ceilings: list[Ceilings]
    memory: Memory
    growth: Growth
    whole_way: WholeWay

    def save(self, file: Path) -> None:
        file.write_bytes(_ADAPTER.dump_json(self, indent=1))


_ADAPTER = TypeAdapter(Results)


def load_results(file: Path) -> Results:
    return _ADAPTER.validate_json(file.read_bytes())


def look_at_machine(servers: Servers, load_before: float) -> Machine:
    with MongoClient[dict[str, Any]](servers.mongo.url) as client:
        mongodb = client.server_info()["version"]
    url = httpx.URL(servers.rabbit.url)
    overview: Mapping[str, Any] = httpx.get(
        f"{servers.rabbit.management_url}/api/overview", auth=(url.username, url.password)
    ).json()
    return Machine(
        date=datetime.now(UTC).date().isoformat(),
        cores=os.cpu_count() or 1,
        memory_gb=psutil.virtual_memory().total / 2**30,
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        mongodb=mongodb,
        rabbitmq=overview["rabbitmq_version"],
        load_before=load_before,
    )
