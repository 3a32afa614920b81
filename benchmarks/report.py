"""The tables, for a terminal and for README.md."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable

from benchmarks.contenders import NAIVE, OURS, mq_bridge
from benchmarks.drain import Drain
from benchmarks.plan import PACED_PER_SECOND
from benchmarks.results import Machine, Results
from benchmarks.run import (
    BRIDGE_FIRST_START,
    BRIDGE_STREAM,
    FIRST_START,
    NAIVE_STREAM,
    STREAM,
    STREAM_FIVE_A_KEY,
)
from benchmarks.statistics import Spread, ratios
from benchmarks.sustained import OPEN_LIMIT
from benchmarks.targets import judge

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"

#: The row that each drain is compared with.
RIVALS = {
    BRIDGE_STREAM: STREAM,
    BRIDGE_FIRST_START: FIRST_START,
    NAIVE_STREAM: STREAM,
    STREAM_FIVE_A_KEY: STREAM,
}

CAVEATS: Sequence[str] = (
    "Servers, contenders, writers and consumer share one machine: compare ratios, not rates.",
    (
        "mq-bridge writes no marks into the outbox and knows no keys; ours marks every event, and "
        "has one event of a key in flight: the row with five events per key shows the cost."
    ),
    "mq-bridge sends the whole document, about 750 bytes; the others send its payload of 500.",
    "The naive loop drains fewer events than the others; its rate is not scaled.",
    (
        "A rate counts from the first arrival seen in the queue; `from start` also counts the "
        "start of the process, most of which is Python's own."
    ),
    "One mongod and one RabbitMQ node: a majority is one node, and there is no network latency.",
)


@dataclass(frozen=True)
class Table:
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def tables(results: Results) -> list[Table]:
    shown = [_latency(results), _drains(f"Draining {results.plan.drain_count:,}", results.drains)]
    if results.large[STREAM]:
        shown.append(_drains(f"Draining {results.plan.large_count:,}", results.large))
    return [*shown, _ceilings(results), _whole_way(results), _growth(results), _targets(results)]


def print_report(results: Results, console: Console) -> None:
    console.print(_headline(results.machine))
    for table in tables(results):
        rich = RichTable(*table.header, title=table.title, title_justify="left")
        for row in table.rows:
            rich.add_row(*row)
        console.print(rich)
    for caveat in CAVEATS:
        console.print(f"- {caveat}", style="dim")
    console.print(last_line(results))


def write_report(results: Results, readme: Path) -> None:
    """Put the tables between the marks in README.md."""
    before, _, rest = readme.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    lines = [BEGIN, "", _headline(results.machine), ""]
    for table in tables(results):
        lines += [f"### {table.title}", "", *_markdown(table), ""]
    lines += [last_line(results), "", END]
    readme.write_text(before + "\n".join(lines) + after)


def last_line(results: Results) -> str:
    judged = judge(results)
    failed = [target for target in judged if not target.holds]
    if not failed:
        return f"All {len(judged)} targets hold."
    words = "; ".join(f"{target.words} ({target.found})" for target in failed)
    return f"{len(judged) - len(failed)} of {len(judged)} targets hold. Missed: {words}."


def _markdown(table: Table) -> list[str]:
    return [
        "| " + " | ".join(cells) + " |"
        for cells in (table.header, ["---"] * len(table.header), *table.rows)
    ]


def _headline(machine: Machine) -> str:
    return (
        f"{machine.date}, {machine.cores} cores, {machine.memory_gb:.0f} GB, {machine.system}, "
        f"Python {machine.python}, MongoDB {machine.mongodb}, RabbitMQ {machine.rabbitmq}; "
        f"load before the run {machine.load_before:.1f}. "
        "Medians of the rounds; minimum and maximum in brackets."
    )


def _latency(results: Results) -> Table:
    rows = []
    ours = results.latency[OURS.name]
    for name in (OURS.name, mq_bridge(1).name, NAIVE.name):
        theirs = results.latency[name]
        p50, p95, p99 = (
            [getattr(one, quantile) for one in theirs]
            for quantile in ("p50_ms", "p95_ms", "p99_ms")
        )
        compared = ["", ""]
        if theirs is not ours:
            compared = [
                _ratio(ratios([one.p50_ms for one in ours], p50)),
                _ratio(ratios([one.p99_ms for one in ours], p99)),
            ]
        figures = [_spread(Spread.of(values), 1) for values in (p50, p95, p99)]
        rows.append([name, *figures, *compared])
    title = f"Latency, commit returned to consumer received, {PACED_PER_SECOND:g} events/s"
    header = ["", "p50 ms", "p95 ms", "p99 ms", "ours to it, p50", "ours to it, p99"]
    return Table(title, header, rows)


def _drains(title: str, drains: dict[str, list[Drain]]) -> Table:
    rows = []
    for name, rounds in drains.items():
        rates = [one.rate_per_second for one in rounds]
        rival = RIVALS.get(name)
        settled = [one.settled_rate_per_second or 0.0 for one in rounds]
        rows.append(
            [
                name,
                f"{rounds[0].count:,}",
                _spread(Spread.of(rates)),
                _spread(Spread.of(settled)) if all(settled) else "",
                _spread(Spread.of([one.seconds_from_start for one in rounds]), 1),
                _spread(Spread.of([one.cpu_microseconds for one in rounds])),
                _spread(Spread.of([one.servers_cpu_microseconds for one in rounds])),
                _ratio(ratios([one.rate_per_second for one in drains[rival]], rates))
                if rival
                else "",
            ]
        )
    header = [
        "",
        "events",
        "events/s in the queue",
        "events/s settled",
        "s from start",
        "own µs per event",
        "servers' µs per event",
        "ours to it",
    ]
    return Table(title, header, rows)


def _ceilings(results: Results) -> Table:
    names = {
        "null_publisher": "ours, null publisher",
        "flood": "flood of ready-made frames",
        "null_publisher_beside": "ours, null publisher, beside the flood",
        "flood_beside": "flood, beside the null publisher",
    }
    rows = [
        [words, _spread(Spread.of([getattr(one, name) for one in results.ceilings]))]
        for name, words in names.items()
    ]
    return Table("Ceilings", ["", "events/s"], rows)


def _whole_way(results: Results) -> Table:
    way = results.whole_way
    rows = [
        ["POST answered 202, per second", f"{way.posts_per_second:,.0f}"],
        ["POST p50 and p99 ms", f"{way.post_p50_ms:.1f} and {way.post_p99_ms:.1f}"],
        ["POST to acknowledged, per second", f"{way.acknowledged_per_second:,.0f}"],
        [
            f"POST to acknowledged at {way.paced_per_second:g}/s, p50 and p99 ms",
            f"{way.way_p50_ms:.1f} and {way.way_p99_ms:.1f}",
        ],
    ]
    sustained = way.sustained
    rows += [
        [
            f"the same for {sustained.seconds:g} s with at most {OPEN_LIMIT} open, per second",
            f"{sustained.per_second:,.0f}",
        ],
        ["its p50 and p99 ms", f"{sustained.p50_ms:.0f} and {sustained.p99_ms:.0f}"],
        ["its ceiling: bare calls per second", f"{sustained.bare_per_second:,.0f}"],
        ["share of the ceiling", f"{sustained.share_of_ceiling:.2f}"],
    ]
    return Table(f"The whole way, {way.posts:,} requests", ["", "found"], rows)


def _growth(results: Results) -> Table:
    memory, growth = results.memory, results.growth
    rows = [
        ["MB resident before the first event", f"{memory.idle_mb:.0f}"],
        [f"MB early in {memory.count:,} events", f"{memory.early_mb:.0f}"],
        ["MB at their end", f"{memory.late_mb:.0f}"],
        ["maximum MB", f"{memory.most_mb:.0f}"],
        ["time per event", _ratio(growth.elapsed)],
        ["the relay's CPU time per event", _ratio(growth.relay_cpu)],
        ["the servers' CPU time per event", _ratio(growth.servers_cpu)],
    ]
    title = (
        f"Memory over {memory.count:,} events; cost per event beside {growth.many:,} past ones, "
        f"relative to {growth.few:,}"
    )
    return Table(title, ["", "found"], rows)


def _targets(results: Results) -> Table:
    rows = [
        [target.words, "holds" if target.holds else "missed", target.found]
        for target in judge(results)
    ]
    return Table("Targets", ["", "", "found"], rows)


def _spread(spread: Spread, digits: int = 0) -> str:
    low, high = f"{spread.minimum:,.{digits}f}", f"{spread.maximum:,.{digits}f}"
    return f"{spread.median:,.{digits}f} ({low} to {high})"


def _ratio(spread: Spread) -> str:
    return _spread(spread, 2)
