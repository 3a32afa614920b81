"""docs/logs.md lists every log event of the product with its levels, packages and fields."""

import re

import pytest

from tests.support.log_calls import LogCalls, NotUnderstoodError
from tests.support.paths import REPOSITORY

PRODUCT = ("outbox", "assistance", "runtime", "service", "relay", "consumers")
PAGE = REPOSITORY / "docs" / "logs.md"

Row = tuple[set[str], set[str], set[str]]


def events_of_the_page() -> list[tuple[str, Row]]:
    table, _, _ = PAGE.read_text().partition("\n## ")
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("| `")]
    return [
        (event.strip(" `"), (_items(levels), _items(processes), _items(fields)))
        for event, levels, processes, fields, _ in rows
    ]


def context_of_the_page() -> set[str]:
    _, _, second = PAGE.read_text().partition("\n## ")
    return set(re.findall(r"^\| `([^`]+)` \|", second, re.MULTILINE))


def _items(cell: str) -> set[str]:
    return {item.strip(" `") for item in cell.split(",") if item.strip()}


def product_calls() -> LogCalls:
    calls = LogCalls()
    for package in PRODUCT:
        calls.read_package(REPOSITORY / package)
    return calls


def calls_in(source: str) -> LogCalls:
    calls = LogCalls()
    calls.read_source("from loguru import logger\n" + source, "relay", "relay/example.py")
    return calls


def test_the_page_and_the_code_agree_on_every_log_event() -> None:
    page, found = dict(events_of_the_page()), product_calls().events
    problems = [
        f"add a row for `{event}` ({', '.join(found[event].places)})"
        for event in sorted(found.keys() - page.keys())
    ]
    problems += [
        f"remove the row of `{event}`: nothing logs it" for event in sorted(page.keys() - found)
    ]
    for event in sorted(found.keys() & page.keys()):
        expected = (found[event].levels, found[event].packages, found[event].fields)
        for column, written, logged in zip(
            ("level", "process", "fields"), page[event], expected, strict=True
        ):
            if written != logged:
                problems.append(
                    f"`{event}`, column {column}: write {', '.join(sorted(logged)) or 'nothing'} "
                    f"({', '.join(found[event].places)})"
                )
    assert not problems, "correct docs/logs.md:\n" + "\n".join(problems)


def test_each_event_has_one_row_in_order_of_its_name() -> None:
    events = [event for event, _ in events_of_the_page()]
    assert events == sorted(set(events))


def test_the_page_lists_the_fields_of_every_context() -> None:
    context = product_calls().context
    assert context_of_the_page() == set(context), f"correct docs/logs.md, second table: {context}"


def test_fields_of_the_call_of_bind_and_of_a_bound_name_are_found() -> None:
    calls = calls_in(
        "about = logger.bind(a=1)\n"
        "about.info('x', b=2)\n"
        "logger.bind(c=3).bind(d=4).opt(lazy=True).error('x', **more)\n"
    )
    event = calls.events["x"]
    assert event.fields == {"a", "b", "c", "d", "..."}
    assert event.levels == {"info", "error"}


def test_levels_and_names_that_are_chosen_are_all_found() -> None:
    calls = calls_in(
        "level = 'INFO' if good else 'WARNING'\nlogger.log(level, 'yes' if good else 'no')\n"
    )
    assert calls.events.keys() == {"yes", "no"}
    assert calls.events["yes"].levels == {"info", "warning"}


def test_a_computed_name_is_listed_as_its_expression() -> None:
    assert calls_in("logger.error(str(error))").events.keys() == {"{str(error)}"}


def test_fields_of_a_context_are_found() -> None:
    assert calls_in("with logger.contextualize(a=1):\n    pass\n").context.keys() == {"a"}


@pytest.mark.parametrize(
    "source",
    ["write = logger.info", "report(logger)", "self.log = logger.bind(a=1)", "logger.catch()"],
)
def test_a_use_that_cannot_be_followed_is_refused(source: str) -> None:
    with pytest.raises(NotUnderstoodError):
        calls_in(source)
