"""The file with the settings and secrets of `make up`: readable by its owner only, and removed."""

import json
import stat
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from sandbox.__main__ import ENV_FILE, env_file

SETTINGS = {
    "PLAIN": "mongodb://127.0.0.1:1/?replicaSet=rs0&x=1",
    "SPACES": "two  words",
    "QUOTES": """it's "quoted" """,
    "SHELL": "$HOME `id` $(id) \\ ; # & | > ! *",
    "LINES": "first\nsecond",
    "EMPTY": "",
    "UMLAUT": "für",
}

PRINT = "import json, os; print(json.dumps(dict(os.environ)))"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / ENV_FILE


def test_a_shell_reads_each_value_as_it_is(path: Path) -> None:
    with env_file(path, SETTINGS):
        shell = f'set -a; . "{path}"; set +a; exec "$0" -c "$1"'
        output = subprocess.check_output(["/bin/sh", "-c", shell, sys.executable, PRINT])
    read = json.loads(output)
    assert {name: read[name] for name in SETTINGS} == SETTINGS


@pytest.mark.parametrize("left_over_mode", [None, 0o644])
def test_only_its_owner_may_read_it(path: Path, left_over_mode: int | None) -> None:
    if left_over_mode is not None:
        path.write_text("SECRET=of the last run")
        path.chmod(left_over_mode)
    with env_file(path, SETTINGS):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert "of the last run" not in path.read_text()


@pytest.mark.parametrize("end", [None, KeyboardInterrupt, RuntimeError])
def test_it_is_removed_however_the_run_ends(path: Path, end: type[BaseException] | None) -> None:
    expected = pytest.raises(end) if end else nullcontext()
    with expected, env_file(path, SETTINGS):
        assert path.exists()
        if end:
            raise end
    assert not path.exists()
