"""What all commands have in common: options, exit codes, and output that another program reads."""

import re
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import version
from typing import Any

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

from runtime.exit_codes import ExitCode
from runtime.terminal import CommandLine, confirm, print_table
from tests.support.paths import REPOSITORY

PROGRAMS = ("service", "relay", "consumers")

#: They print nothing that a program could read: their output is their log.
WITHOUT_JSON = {"service run", "relay run"}


def commands_of(program: str) -> CommandLine:
    commands: CommandLine = import_module(f"{program}.__main__").commands
    return commands


def leaves(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    below = getattr(command, "commands", None)
    if below is None:
        yield name, command
        return
    for word, one in below.items():
        yield from leaves(one, f"{name} {word}")


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_command_that_prints_prints_json_when_asked(program: str) -> None:
    without = {
        name
        for name, command in leaves(get_command(commands_of(program)), program)
        if not any("--json" in parameter.opts for parameter in command.params)
    }
    assert without == {name for name in WITHOUT_JSON if name.startswith(program)}


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_prints_its_version(program: str) -> None:
    ended = CliRunner().invoke(commands_of(program), ["--version"])
    assert (ended.exit_code, ended.output.strip()) == (0, version("assistance-relay"))


def test_the_runbook_explains_every_exit_code() -> None:
    section = (REPOSITORY / "docs/runbook.md").read_text().partition("## Exit codes")[2]
    explained = re.findall(r"^\| (\d+) \|", section.partition("\n## ")[0], re.MULTILINE)
    assert [int(code) for code in explained] == [code.value for code in ExitCode]


def test_a_programming_error_is_not_mistaken_for_an_answer(
    capsys: pytest.CaptureFixture[str],
) -> None:
    commands = CommandLine()

    @commands.command()
    def broken() -> None:
        raise ZeroDivisionError

    with pytest.raises(SystemExit) as ended:
        commands([])
    assert ended.value.code == ExitCode.INTERNAL_ERROR
    assert "ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.parametrize("answer", ["n\n", ""])
def test_a_question_without_a_yes_ends_the_command_and_leaves_standard_output_alone(
    answer: str,
) -> None:
    commands = CommandLine()

    @commands.command()
    def ask() -> None:
        confirm("discard 3 letters?")
        typer.echo("done")

    ended = CliRunner().invoke(commands, input=answer)
    assert ended.exit_code == ExitCode.INTERRUPTED
    assert not {"done", "discard"} & set(ended.stdout.split())
    assert "not confirmed: nothing was changed" in ended.stderr


def test_a_piped_table_has_one_line_per_row_and_breaks_no_cell(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    print_table(("id", "text"), [("a" * 90, "b" * 150), ("c", None)], if_empty="nothing")
    assert capsys.readouterr().out == (f"{'id':90}  text\n{'a' * 90}  {'b' * 150}\n{'c':90}  -\n")


def test_a_table_without_rows_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("id",), [], if_empty="no event is held or parked")
    assert capsys.readouterr().out == "no event is held or parked\n"
