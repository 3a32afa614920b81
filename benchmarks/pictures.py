"""Draws a run's pictures; run by the Python of the benchmark's own equipment."""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

SIZE_INCHES, DOTS_PER_INCH = (6.4, 3.6), 90


def draw(results: dict[str, Any], folder: Path) -> None:
    _draw_latency(results, folder / "benchmark-latency.png")
    _draw_drain(results, folder / "benchmark-drain.png")


def _draw_latency(results: dict[str, Any], file: Path) -> None:
    figure, axes = plt.subplots(figsize=SIZE_INCHES, layout="constrained")
    for name, offered in results["offered"].items():
        points = offered + _median_round(results["latency"][name])
        points.sort(key=lambda one: one["offered_per_second"])
        loads = [one["offered_per_second"] for one in points]
        (line,) = axes.plot(loads, [one["p50_ms"] for one in points], "o-", label=f"{name}, p50")
        p99 = [one["p99_ms"] for one in points]
        axes.plot(loads, p99, "o:", color=line.get_color(), label=f"{name}, p99")
    axes.set(xscale="log", yscale="log", xlabel="events a second, each in its transaction")
    axes.set_xticks(loads, [f"{load:g}" for load in loads])
    axes.minorticks_off()
    axes.set_ylabel("commit to consumer, ms")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize="x-small")
    figure.savefig(file, dpi=DOTS_PER_INCH)


def _median_round(rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rounds, key=lambda one: one["p50_ms"])[len(rounds) // 2 :][:1]


def _draw_drain(results: dict[str, Any], file: Path) -> None:
    figure, axes = plt.subplots(figsize=SIZE_INCHES, layout="constrained")
    for name, rounds in results["drains"].items():
        middle = sorted(rounds, key=lambda one: one["rate_per_second"])[len(rounds) // 2]
        times, counts = zip(*middle["curve"], strict=True)
        axes.plot([time - times[0] for time in times], counts, label=name)
    axes.set(xlabel="seconds since the first arrival", ylabel="messages in the queue")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize="x-small")
    figure.savefig(file, dpi=DOTS_PER_INCH)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
