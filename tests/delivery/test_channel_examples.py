"""The channel in docs/examples: outside the package, found by its entry point, and at work."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sandbox.waiting import wait_until
from tests.conftest import RunProcess
from tests.support.deliveries import CHANNEL_OF, Deliveries
from tests.support.paths import REPOSITORY
from tests.support.third_parties import ThirdParties

EXAMPLE = REPOSITORY / "docs" / "examples" / "apprise_channel"


def install(folder: Path) -> Path:
    """Install the example beside the environment, from its own pyproject.toml; fetches nothing."""
    source = shutil.copytree(EXAMPLE, folder / "source")
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"),
            *("--no-index", "--no-deps", "--no-build-isolation"),
            *("--target", folder / "installed", source),
        ],
        check=True,
    )
    return folder / "installed"


def test_a_channel_from_outside_delivers_by_configuration_alone(
    tmp_path: Path,
    deliveries: Deliveries,
    third_parties: ThirdParties,
    run_process: RunProcess,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(CHANNEL_OF, "desk", "apprise")
    environment = deliveries.environment(
        destinations=json.dumps({"desk": "apprise"}),
        routes=json.dumps({"sales": ["desk"]}),
        desk_url=third_parties.webhooks_url.replace("http://", "json://") + "hush-hush",
    )
    without = run_process("consumers", "run", "desk", environment=environment)
    assert without.wait_exit() == 78
    assert "there is no channel 'apprise'; known: email, slack, webhook" in without.output()

    environment["PYTHONPATH"] = str(install(tmp_path))
    worker = run_process("consumers", "run", "desk", environment=environment)
    worker.wait_log("queue.receiving")
    request_id = deliveries.accept("Is it in stock?", destinations=["desk"])
    deliveries.publish_pending()

    wait_until(
        lambda: deliveries.request(request_id)["status"] == "succeeded", "Apprise has delivered it"
    )
    [received] = third_parties.received("webhook")
    assert received["destination"] == "hush-hush"
    assert "Is it in stock?" in json.loads(received["body"])["message"]
    assert "hush-hush" not in worker.output()
    assert "Is it in stock?" not in worker.output()
