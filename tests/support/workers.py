"""How many processes run the tests: three for a folder, one for a file or a single test."""

from pathlib import Path

import pytest

UNIT = Path(__file__).parents[1] / "unit"

#: Each has servers of its own. More than the cores, because most tests wait for something.
WORKERS = 3

#: Options that need the tests in pytest's own process.
DEBUGGING = ("usepdb", "trace", "collectonly")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """
    Choose where `-n` is not given: so `pytest --pdb tests/x.py::test_y` works as it stands.

    tests/unit gets no workers: its tests end sooner than workers start.
    """
    option = config.option
    if option.numprocesses is not None or hasattr(config, "workerinput"):
        return
    if any(getattr(option, name, False) for name in DEBUGGING):
        return
    paths = {Path(argument.partition("::")[0]).resolve() for argument in config.args}
    if all(path.is_relative_to(UNIT) for path in paths):
        return
    if len(paths) == 1 and paths.pop().is_file():
        return
    option.numprocesses = WORKERS
    if option.dist == "no":
        option.dist = "worksteal"
