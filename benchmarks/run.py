"""One run of everything, in rounds: A B C A B C, so that a disturbance affects all contenders."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from benchmarks.ceilings import measure_ceilings
from benchmarks.contenders import NAIVE, OURS, mq_bridge
from benchmarks.drain import Drain, drain_first_start, drain_stream
from benchmarks.growth import measure_growth, measure_memory
from benchmarks.latency import measure_latency
from benchmarks.plan import PACED_PER_SECOND, WHOLE_WAY_PER_SECOND, Plan
from benchmarks.results import Results, look_at_machine
from benchmarks.whole_way import measure_whole_way
from sandbox.servers import Servers, open_servers

Say = Callable[[str], None]
Measured = TypeVar("Measured")

STREAM = "ours, stream"
STREAM_FIVE_A_KEY = "ours, stream, 5 events a key"
FIRST_START = "ours, first start"
BRIDGE_STREAM = "mq-bridge batch_size=1024, stream"
BRIDGE_FIRST_START = "mq-bridge batch_size=1024, first start"
NAIVE_STREAM = "naive loop, stream"


def run(plan: Plan, folder: Path, say: Say) -> Results:
    load_before = os.getloadavg()[0]
    say("Starting MongoDB and RabbitMQ ...")
    with open_servers(folder / "servers") as servers:
        machine = look_at_machine(servers, load_before)
        slow_or_quick = (OURS, mq_bridge(1), NAIVE)
        latency = _rounds(
            "latency",
            plan.rounds,
            {
                contender.name: lambda contender=contender: measure_latency(  # type: ignore[misc]
                    servers, folder, contender, [PACED_PER_SECOND], plan.latency_seconds
                )[0]
                for contender in slow_or_quick
            },
            say,
        )
        offered = {}
        for contender in slow_or_quick:
            say(f"latency against offered load: {contender.name}")
            loads = list(plan.offered_loads)
            offered[contender.name] = measure_latency(
                servers, folder, contender, loads, plan.offered_seconds
            )
        drains = _rounds("drain", plan.rounds, _drains(servers, folder, plan), say)
        large = _rounds("large drain", plan.large_rounds, _large(servers, folder, plan), say)
        ceilings = []
        for number in range(plan.ceiling_rounds):
            say(f"ceilings, round {number + 1} of {plan.ceiling_rounds}")
            ceilings.append(measure_ceilings(servers, folder, plan.drain_count, plan.flood_count))
        say(f"memory over {plan.memory_count:,} events")
        memory = measure_memory(servers, folder, plan.memory_count)
        say(f"growth: {plan.growth_few:,} and {plan.growth_many:,} past events")
        growth = measure_growth(
            servers,
            folder,
            few=plan.growth_few,
            many=plan.growth_many,
            count=plan.growth_count,
            rounds=plan.growth_rounds,
        )
    say("the whole way: service, relay, worker, Slack")
    whole_way = measure_whole_way(folder / "stack", plan, paced_per_second=WHOLE_WAY_PER_SECOND)
    return Results(
        machine, plan, latency, offered, drains, large, ceilings, memory, growth, whole_way
    )


def _drains(servers: Servers, folder: Path, plan: Plan) -> Mapping[str, Callable[[], Drain]]:
    count, bridge = plan.drain_count, mq_bridge(1024)
    return {
        STREAM: lambda: drain_stream(servers, folder, OURS, count, marks=True),
        BRIDGE_STREAM: lambda: drain_stream(servers, folder, bridge, count),
        STREAM_FIVE_A_KEY: lambda: drain_stream(
            servers, folder, OURS, count // 2, events_per_key=5, marks=True
        ),
        FIRST_START: lambda: drain_first_start(servers, folder, OURS, count, marks=True),
        BRIDGE_FIRST_START: lambda: drain_first_start(
            servers, folder, mq_bridge(1024, reads_existing=True), count
        ),
        NAIVE_STREAM: lambda: drain_stream(servers, folder, NAIVE, plan.naive_count),
    }


def _large(servers: Servers, folder: Path, plan: Plan) -> Mapping[str, Callable[[], Drain]]:
    count, bridge = plan.large_count, mq_bridge(1024)
    return {
        STREAM: lambda: drain_stream(servers, folder, OURS, count, marks=True),
        BRIDGE_STREAM: lambda: drain_stream(servers, folder, bridge, count),
    }


def _rounds(
    what: str, rounds: int, measurements: Mapping[str, Callable[[], Measured]], say: Say
) -> dict[str, list[Measured]]:
    found: dict[str, list[Measured]] = {name: [] for name in measurements}
    for number in range(rounds):
        for name, measure in measurements.items():
            say(f"{what}, round {number + 1} of {rounds}: {name}")
            found[name].append(measure())
    return found
