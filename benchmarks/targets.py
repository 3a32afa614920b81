"""The targets, and whether a run met them."""

from dataclasses import dataclass

from benchmarks.contenders import NAIVE, OURS, mq_bridge
from benchmarks.drain import Drain
from benchmarks.results import Results
from benchmarks.run import BRIDGE_FIRST_START, BRIDGE_STREAM, FIRST_START, STREAM
from benchmarks.statistics import ratios

MEMORY_LIMIT_MB = 100

CEILING_SHARE = 0.5

#: Costs and memory that differ by less count as the same: noise, not growth.
FLAT_RATIO = 1.1


@dataclass(frozen=True)
class Target:
    words: str
    holds: bool
    found: str


def judge(results: Results) -> list[Target]:
    judged = []
    for other in (mq_bridge(1).name, NAIVE.name):
        ours, theirs = results.latency[OURS.name], results.latency[other]
        p50 = ratios([one.p50_ms for one in ours], [one.p50_ms for one in theirs]).median
        p99 = ratios([one.p99_ms for one in ours], [one.p99_ms for one in theirs]).median
        judged.append(
            Target(
                f"latency at or below {other}",
                p50 <= 1 and p99 <= 1,
                f"p50 {p50:.2f}, p99 {p99:.2f} times its latency",
            )
        )
    judged += [
        _drain_target(drains, STREAM, BRIDGE_STREAM)
        for drains in (results.drains, results.large)
        if drains[STREAM]
    ]
    judged.append(_drain_target(results.drains, FIRST_START, BRIDGE_FIRST_START))
    memory, growth = results.memory, results.growth
    judged.append(
        Target(
            f"at most {MEMORY_LIMIT_MB} MB resident, flat over {memory.count:,} events",
            memory.most_mb <= MEMORY_LIMIT_MB and memory.late_mb <= memory.early_mb * FLAT_RATIO,
            f"maximum {memory.most_mb:.0f} MB, {memory.early_mb:.0f} early, "
            f"{memory.late_mb:.0f} late",
        )
    )
    relay_cpu, servers_cpu = growth.relay_cpu.median, growth.servers_cpu.median
    judged.append(
        Target(
            f"an event costs the same beside {growth.many:,} past ones as beside {growth.few:,}",
            max(relay_cpu, servers_cpu, growth.elapsed.median) <= FLAT_RATIO,
            f"{growth.elapsed.median:.2f} times the time, {relay_cpu:.2f} the relay's CPU time, "
            f"{servers_cpu:.2f} the servers'",
        )
    )
    sustained = results.whole_way.sustained
    judged.append(
        Target(
            f"{sustained.seconds:g} s of requests, POST to acknowledged, at half the ceiling",
            sustained.share_of_ceiling >= CEILING_SHARE,
            f"{sustained.share_of_ceiling:.2f} of it",
        )
    )
    return judged


def _drain_target(drains: dict[str, list[Drain]], ours: str, theirs: str) -> Target:
    rate = ratios(
        [one.rate_per_second for one in drains[ours]],
        [one.rate_per_second for one in drains[theirs]],
    )
    return Target(
        f"draining {drains[ours][0].count:,} at or above {theirs}",
        rate.median >= 1,
        f"{rate.median:.2f} times its rate",
    )
