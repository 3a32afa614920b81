"""`python -m benchmarks`"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.contenders import EQUIPMENT_PYTHON, HERE, bring_equipment
from benchmarks.field import MeasurementFailed
from benchmarks.plan import LONG, QUICK, USUAL
from benchmarks.report import print_report, write_report
from benchmarks.results import load_results
from benchmarks.run import run
from sandbox.errors import SandboxError

LOCAL = HERE.parent / ".local" / "benchmarks"
RESULTS = LOCAL / "results.json"
DOCS = HERE.parent / "docs"

#: The width of output that does not go to a terminal: that of the widest table.
WIDTH = 160


commands = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@commands.command()
def benchmark(
    *,
    json: Annotated[bool, typer.Option("--json", help="print the results as JSON")] = False,
    write: Annotated[
        bool, typer.Option("--write", help="put the tables into benchmarks/README.md")
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="only try whether the benchmark works")
    ] = False,
    last: Annotated[
        bool, typer.Option("--last", help="measure nothing: show the last run's results")
    ] = False,
) -> None:
    """Measure the relay beside others on servers of its own. LONG=1 takes the million."""
    said = Console(stderr=True)
    LOCAL.mkdir(parents=True, exist_ok=True)
    if not last:
        plan = QUICK if quick else LONG if os.environ.get("LONG") else USUAL
        began = time.monotonic()

        def say(step: str) -> None:
            said.print(f"{time.monotonic() - began:5.0f} s  {step}", style="dim", highlight=False)

        bring_equipment(say)
        folder = Path(tempfile.mkdtemp(dir=LOCAL, prefix="run-"))
        try:
            run(plan, folder, say).save(RESULTS)
        except (SandboxError, MeasurementFailed) as failure:
            sys.exit(f"{failure}\nLogs are in {folder}")
        shutil.rmtree(folder)
    if not RESULTS.exists():
        sys.exit("no run has been saved: run without --last")
    results = load_results(RESULTS)
    if not quick:
        drawing = [EQUIPMENT_PYTHON, HERE / "pictures.py", RESULTS, DOCS]
        subprocess.run(drawing, check=True)
    if write:
        write_report(results, HERE / "README.md")
    if json:
        sys.stdout.write(RESULTS.read_text())
    else:
        terminal = Console()
        print_report(results, terminal if terminal.is_terminal else Console(width=WIDTH))


if __name__ == "__main__":
    commands()
