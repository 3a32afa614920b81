"""
Postman collections as tests understand them.

A test script has these lines, and no others:

    pm.test("...", () => pm.response.to.have.status(202));
    pm.test("...", () => pm.expect(pm.response.json().MEMBER).to.eql("VALUE"));
    pm.test("...", () => pm.expect(pm.response.json().MEMBER).to.eql(pm.collectionVariables.get("NAME")));
    pm.collectionVariables.set("NAME", pm.response.json().MEMBER);
"""  # noqa: E501  as they stand in the collection

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

TEST = re.compile(r'pm\.test\("[^"]+", \(\) => (.+)\);')
STATUS = re.compile(r"pm\.response\.to\.have\.status\((\d+)\)")
MEMBER = r"pm\.response\.json\(\)\.(\w+)"
EQUAL = re.compile(rf'pm\.expect\({MEMBER}\)\.to\.eql\("([^"]*)"\)')
EQUAL_VARIABLE = re.compile(
    rf'pm\.expect\({MEMBER}\)\.to\.eql\(pm\.collectionVariables\.get\("(\w+)"\)\)'
)
REMEMBER = re.compile(rf'pm\.collectionVariables\.set\("(\w+)", {MEMBER}\);')
VARIABLE = re.compile(r"\{\{(\w+)\}\}")


class NotUnderstoodError(Exception):
    """A part of a collection that these tests would not send or check as Postman does."""


@dataclass(frozen=True, slots=True)
class Call:
    """
    One request and the assertions of its script.

    members: expected values by member of the response; `{{NAME}}` is a variable's value.
    remembers: the response's member by the variable that keeps it.
    """

    name: str
    method: str
    url: str
    headers: tuple[tuple[str, str], ...]
    body: str
    status: int
    members: tuple[tuple[str, str], ...]
    remembers: Mapping[str, str]

    def variables(self) -> set[str]:
        texts = [self.url, self.body, *(value for _, value in (*self.headers, *self.members))]
        return {name for text in texts for name in VARIABLE.findall(text)}

    def send(self, http: httpx.Client, variables: dict[str, str]) -> None:
        """Send the request, check the assertions and set the variables as Postman would."""

        def filled(text: str) -> str:
            return VARIABLE.sub(lambda found: variables[found[1]], text)

        headers = [(name, filled(value)) for name, value in self.headers]
        answer = http.request(
            self.method, filled(self.url), headers=headers, content=filled(self.body)
        )
        assert answer.status_code == self.status, f"{self.name}: {answer.text}"
        for member, value in self.members:
            assert answer.json()[member] == filled(value), f"{self.name}: {member}"
        for variable, member in self.remembers.items():
            variables[variable] = answer.json()[member]


def read_calls(collection: Mapping[str, Any], environment: Mapping[str, Any]) -> list[Call]:
    """Raises NotUnderstoodError: it names the request and what is wrong with it."""
    known = {value["key"] for value in (*environment["values"], *collection.get("variable", ()))}
    calls = []
    for item in collection["item"]:
        call = _read_call(item)
        if unknown := call.variables() - known:
            raise NotUnderstoodError(f"{call.name}: unknown variables {sorted(unknown)}")
        if undeclared := set(call.remembers) - known:
            raise NotUnderstoodError(f"{call.name}: undeclared variables {sorted(undeclared)}")
        calls.append(call)
    if len({call.name for call in calls}) < len(calls):
        raise NotUnderstoodError("two requests have the same name")
    return calls


def uncovered(calls: Iterable[Call], paths: Mapping[str, Any]) -> set[tuple[str, str]]:
    """
    Give the operations of an OpenAPI document that no call uses, and the calls' own strangers.

    `/docs` is not an operation: it shows the document.
    """
    operations = {(method, path) for path, methods in paths.items() for method in methods}
    used = {operation_of(call, paths) for call in calls}
    return used.symmetric_difference(operations) - {("get", "/docs")}


def operation_of(call: Call, paths: Mapping[str, Any]) -> tuple[str, str]:
    path = call.url.removeprefix("{{baseUrl}}").partition("?")[0]
    for template in sorted(paths, key=lambda template: "{" in template):
        if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", template), path):
            return call.method.lower(), template
    return call.method.lower(), path


def _read_call(item: Mapping[str, Any]) -> Call:
    name = item.get("name", "a request without a name")
    _only(item, name, "name", "event", "request")
    request = item["request"]
    _only(request, name, "method", "header", "url", "body")
    body = request.get("body", {"mode": "raw", "raw": ""})
    if body["mode"] != "raw":
        raise NotUnderstoodError(f"{name}: the body's mode is {body['mode']}")
    status, members, remembers = _read_script(item, name)
    return Call(
        name=name,
        method=request["method"],
        url=_read_url(request["url"], name),
        headers=tuple((header["key"], header["value"]) for header in request["header"]),
        body=body["raw"],
        status=status,
        members=members,
        remembers=remembers,
    )


def _read_url(url: Mapping[str, Any], name: str) -> str:
    """Postman sends host, path and query, and shows `raw`."""
    _only(url, name, "raw", "host", "path", "query")
    sent = "/".join([*url["host"], *url["path"]])
    if query := url.get("query"):
        sent += "?" + "&".join(f"{pair['key']}={pair['value']}" for pair in query)
    if sent != url["raw"]:
        raise NotUnderstoodError(f"{name}: the parts of the URL are {sent}, not {url['raw']}")
    return sent


def _read_script(
    item: Mapping[str, Any], name: str
) -> tuple[int, tuple[tuple[str, str], ...], dict[str, str]]:
    statuses, members, remembers = [], [], {}
    for event in item.get("event", ()):
        if event["listen"] != "test":
            raise NotUnderstoodError(f"{name}: a script for {event['listen']}")
        for line in event["script"]["exec"]:
            test = TEST.fullmatch(line)
            assertion = test[1] if test else ""
            if found := STATUS.fullmatch(assertion):
                statuses.append(int(found[1]))
            elif found := EQUAL.fullmatch(assertion):
                members.append((found[1], found[2]))
            elif found := EQUAL_VARIABLE.fullmatch(assertion):
                members.append((found[1], f"{{{{{found[2]}}}}}"))
            elif found := REMEMBER.fullmatch(line):
                remembers[found[1]] = found[2]
            else:
                raise NotUnderstoodError(f"{name}: {line}")
    if len(statuses) != 1:
        raise NotUnderstoodError(f"{name}: {len(statuses)} assertions of the status, not one")
    return statuses[0], tuple(members), remembers


def _only(part: Mapping[str, Any], name: str, *known: str) -> None:
    if unknown := part.keys() - set(known):
        raise NotUnderstoodError(f"{name}: {sorted(unknown)}")
