"""Every log line that the product's source can write, found by reading the syntax tree."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

LEVELS = {"trace", "debug", "info", "success", "warning", "error", "critical"}
#: A field whose name is known only when the line is written, from `**mapping`.
OTHER_FIELDS = "..."
#: Methods that write no line and add no field to one.
SET_UP = {"remove", "add", "configure"}


class NotUnderstoodError(Exception):
    """A use of loguru that cannot be followed: call `logger.info("name", ...)` or the like."""


@dataclass(slots=True)
class LogEvent:
    """All calls with one event name. A name or level that is computed reads `{expression}`."""

    levels: set[str] = field(default_factory=set)
    packages: set[str] = field(default_factory=set)
    fields: set[str] = field(default_factory=set)
    places: list[str] = field(default_factory=list)


@dataclass(slots=True)
class LogCalls:
    events: dict[str, LogEvent] = field(default_factory=dict)
    #: fields of `logger.contextualize(...)`, with their places
    context: dict[str, list[str]] = field(default_factory=dict)

    def read_package(self, package: Path) -> None:
        for path in sorted(package.rglob("*.py")):
            name = path.relative_to(package.parent).as_posix()
            self.read_source(path.read_text(), package.name, name)

    def read_source(self, source: str, package: str, name: str) -> None:
        """Raises NotUnderstoodError."""
        tree = ast.parse(source)
        if not any(isinstance(n, ast.ImportFrom) and n.module == "loguru" for n in ast.walk(tree)):
            return
        _Module(tree, package, name, self).read()


class _Module:
    def __init__(self, tree: ast.Module, package: str, name: str, found: LogCalls) -> None:
        self._tree, self._package, self._name, self._found = tree, package, name, found
        #: names of `bound = logger.bind(...)`, with the fields they add
        self._bound: dict[str, set[str]] = {"logger": set()}
        self._followed: set[ast.AST] = set()

    def read(self) -> None:
        for node in ast.walk(self._tree):
            match node:
                case ast.Assign(targets=[ast.Name(id=name)], value=ast.Call() as value):
                    if self._root(value) == "logger":
                        self._bound[name] = self._chain(value)
                        self._follow(value)
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                self._read_call(node, node.func)
        for node in ast.walk(self._tree):
            if (
                isinstance(node, ast.Name)
                and node.id in self._bound
                and isinstance(node.ctx, ast.Load)
                and node not in self._followed
            ):
                raise NotUnderstoodError(f"{self._name}, line {node.lineno}: {node.id}")

    def _read_call(self, call: ast.Call, func: ast.Attribute) -> None:
        if self._root(call) is None:
            return
        place = f"{self._name}:{call.lineno}"
        arguments, method = list(call.args), func.attr
        if method == "contextualize":
            for name in _keywords(call):
                self._found.context.setdefault(name, []).append(place)
        elif method == "log" or method in LEVELS:
            levels = self._texts(arguments.pop(0)) if method == "log" else {method}
            fields = self._chain(func.value) | _keywords(call)
            for name in self._texts(arguments[0]):
                event = self._found.events.setdefault(name, LogEvent())
                event.levels |= {level.lower() for level in levels}
                event.packages.add(self._package)
                event.fields |= fields
                event.places.append(place)
        elif method in {"bind", "opt"}:
            return  # followed from the call that writes the line
        elif method not in SET_UP:
            raise NotUnderstoodError(f"{place}: logger.{method}")
        self._follow(call)

    def _root(self, node: ast.expr) -> str | None:
        """`logger` or a bound name, where the expression is a chain of calls on one."""
        while isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            node = node.func.value
        return node.id if isinstance(node, ast.Name) and node.id in self._bound else None

    def _follow(self, node: ast.expr) -> None:
        while isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            node = node.func.value
        self._followed.add(node)

    def _chain(self, node: ast.expr) -> set[str]:
        fields: set[str] = set()
        while isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr == "bind":
                fields |= _keywords(node)
            node = node.func.value
        return fields | self._bound[node.id] if isinstance(node, ast.Name) else fields

    def _texts(self, node: ast.expr) -> set[str]:
        """Every value that a literal, a choice of literals or a name for one can have."""
        match node:
            case ast.Constant(value=str(text)):
                return {text}
            case ast.IfExp(body=body, orelse=otherwise):
                return self._texts(body) | self._texts(otherwise)
            case ast.Name(id=name) if assigned := list(self._assigned(name)):
                return {text for value in assigned for text in self._texts(value)}
        return {f"{{{ast.unparse(node)}}}"}

    def _assigned(self, name: str) -> Iterator[ast.expr]:
        for node in ast.walk(self._tree):
            match node:
                case ast.Assign(
                    targets=[ast.Name(id=assigned)], value=ast.Constant() | ast.IfExp() as value
                ) if assigned == name:
                    yield value


def _keywords(call: ast.Call) -> set[str]:
    return {keyword.arg or OTHER_FIELDS for keyword in call.keywords}
