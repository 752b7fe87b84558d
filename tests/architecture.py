"""Detectors for test_architecture.py: each reads parsed sources and yields findings, empty when all is well.

A finding is `path:line: what`. Imports are found wherever they stand: in functions, under `TYPE_CHECKING`, and by
`importlib.import_module("literal")`. Detectors know nothing of the rules' tables; those are in the tests.
"""

import ast
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.api.deps import Requires
from service.auth.principal import Scope

Finding = str
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Source:
    """One module; `path` is relative to `service/`, as in `engine/worker.py`."""

    path: str
    text: str
    tree: ast.Module

    @classmethod
    def parse(cls, path: str, text: str) -> "Source":
        return cls(path, text, ast.parse(text))

    @property
    def package(self) -> list[str]:
        return ["service", *self.path.split("/")[:-1]]

    @property
    def layer(self) -> str:
        return self.path.split("/")[0].removesuffix(".py")

    def at(self, node: ast.AST, what: str) -> Finding:
        return f"{self.path}:{getattr(node, 'lineno', 1)}: {what}"


def read_sources(root: Path) -> list[Source]:
    files = sorted(root.rglob("*.py"))
    return [Source.parse(file.relative_to(root).as_posix(), file.read_text("utf-8")) for file in files]


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a name or attribute; of anything else what can be said, with `?` for the rest."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=value, attr=attr):
            return f"{dotted(value)}.{attr}"
        case ast.Call(func=func):
            return dotted(func)
        case _:
            return "?"


def imported(source: Source) -> Iterator[tuple[ast.AST, str]]:
    """Every imported name as a dotted path; `from a import b` gives `a.b`."""
    for node in ast.walk(source.tree):
        match node:
            case ast.Import(names=names):
                yield from ((node, alias.name) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                base = source.package[: len(source.package) - level + 1] if level else []
                prefix = ".".join([*base, *([module] if module else [])])
                yield from ((node, f"{prefix}.{alias.name}") for alias in names)
            case ast.Call(args=[ast.Constant(value=str(name)), *_]) if dotted(node).endswith(
                ("import_module", "__import__")
            ):
                yield node, name


def layer_violations(
    sources: Sequence[Source], layers: Sequence[Collection[str]], allowed: Collection[tuple[str, str]]
) -> Iterator[Finding]:
    """Imports of `service` that do not point down.

    `layers` is from top to bottom; `allowed` are pairs of an importing layer and a module beside it.
    """
    rank = {name: -number for number, names in enumerate(layers) for name in names}
    for source in sources:
        if source.path == "__init__.py":
            continue
        if source.layer not in rank:
            yield f"{source.path}:1: belongs to no layer"
            continue
        for node, name in imported(source):
            parts = name.split(".")
            if parts[0] != "service" or len(parts) == 1 or parts[1] in {"__version__", source.layer}:
                continue
            if (source.layer, ".".join(parts[1:3])) in allowed:
                continue
            if rank.get(parts[1], 1) >= rank[source.layer]:
                yield source.at(node, f"{source.layer} must not import {name}")


def fence_violations(sources: Sequence[Source], fences: Mapping[str, Sequence[str]]) -> Iterator[Finding]:
    """Imports of a fenced package outside its places; a place is a file or a folder with a trailing slash."""
    for source in sources:
        for node, name in imported(source):
            places = fences.get(name.split(".")[0])
            if places is not None and not _inside(source.path, places):
                yield source.at(node, f"{name} may be imported only in {', '.join(places)}")


def environment_readers(sources: Sequence[Source], places: Sequence[str]) -> Iterator[Finding]:
    """Uses of the environment: `os.environ`, `os.getenv`, `os.putenv` and their kin, however imported."""
    names = {"os.environ", "os.environb", "os.getenv", "os.getenvb", "os.putenv", "os.unsetenv"}
    for source in sources:
        if _inside(source.path, places):
            continue
        uses = [(node, dotted(node)) for node in ast.walk(source.tree) if isinstance(node, ast.Attribute)]
        for node, name in [*uses, *imported(source)]:
            if name in names:
                yield source.at(node, f"{name} belongs to settings/")


def _inside(path: str, places: Sequence[str]) -> bool:
    return any(path == place or (place.endswith("/") and path.startswith(place)) for place in places)


def oversized(sources: Sequence[Source], *, lines: int, function: int) -> Iterator[Finding]:
    """Files and functions (signature and docstring included, decorators not) that are too long."""
    for source in sources:
        if (length := len(source.text.splitlines())) > lines:
            yield f"{source.path}:1: {length} lines"
        for node in ast.walk(source.tree):
            if isinstance(node, FUNCTIONS) and (length := (node.end_lineno or 0) - node.lineno + 1) > function:
                yield source.at(node, f"{node.name} has {length} lines")


MUTABLE = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp, ast.GeneratorExp)
FREEZERS = frozenset({"frozenset", "tuple", "MappingProxyType", "types.MappingProxyType"})
BUILDERS = FREEZERS | {
    *("re.compile", "Path", "TypeVar", "ParamSpec", "NewType", "object", "int", "float", "struct.Struct"),
    *("get_logger", "structlog.get_logger", "logging.getLogger"),  # configured elsewhere, hold nothing of ours
    *("sa.MetaData", "sa.Table", "sa.Column", "sa.Index", "sa.JSON"),  # the shape of the tables, complete once imported
}


def frozen_classes(sources: Sequence[Source]) -> set[str]:
    """Names of the classes in `sources` whose instances cannot change: frozen dataclasses and enums."""
    return {
        node.name
        for source in sources
        for node in ast.walk(source.tree)
        if isinstance(node, ast.ClassDef)
        and (
            any(dotted(base).endswith(("Enum", "NamedTuple")) for base in node.bases)
            or any("dataclass" in dotted(mark) and "frozen=True" in ast.unparse(mark) for mark in node.decorator_list)
        )
    }


def shared_state(sources: Sequence[Source]) -> Iterator[Finding]:
    """What could carry state from one service to another in a process.

    `global` anywhere; at module level (also inside `if`, `try`, `with`, `for`) every name bound to a list, dict or
    set (display or comprehension) or to the result of a call, unless the call is a FREEZER around it, one of
    BUILDERS, or a frozen class of ours; in a class body the same displays. Exempt: `__all__`, `__slots__`,
    `model_config`, and subscripts (type expressions such as `Annotated[...]`).
    """
    immutable = BUILDERS | frozen_classes(sources)
    for source in sources:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Global):
                yield source.at(node, f"global {', '.join(node.names)}")
            if isinstance(node, ast.ClassDef):
                yield from _mutable_bindings(source, node.body, lambda value: isinstance(value, MUTABLE))
        yield from _mutable_bindings(source, source.tree.body, lambda value: _mutable(value, immutable))


def _mutable_bindings(
    source: Source, body: Sequence[ast.stmt], mutable: Callable[[ast.expr], bool]
) -> Iterator[Finding]:
    for node in body:
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = {dotted(target) for target in targets}
            if mutable(node.value) and not names <= {"__all__", "__slots__", "__match_args__", "model_config"}:
                yield source.at(node, f"mutable state: {', '.join(sorted(names))}")
        elif not isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            inner = [child for child in ast.walk(node) if isinstance(child, ast.stmt) and child is not node]
            yield from _mutable_bindings(source, inner, mutable)


def _mutable(value: ast.expr, immutable: Collection[str]) -> bool:
    match value:
        case ast.Call(func=ast.Attribute(value=ast.Constant())):  # "...".join(...)
            return False
        case ast.Call(args=args, keywords=keywords):
            name = dotted(value)
            if name in FREEZERS:
                return False
            arguments = [*args, *(keyword.value for keyword in keywords)]
            return name not in immutable or any(_mutable(argument, immutable) for argument in arguments)
        case ast.Subscript() | ast.Lambda():
            return False
        case _ if isinstance(value, MUTABLE):
            return True
    return any(_mutable(child, immutable) for child in ast.iter_child_nodes(value) if isinstance(child, ast.expr))


def broad_handlers(source: Source) -> Iterator[ast.ExceptHandler | ast.Call]:
    """`except:`, `except Exception`, `except BaseException`, also in a tuple or a group; and `suppress(Exception)`."""
    broad = {"Exception", "BaseException", "ExceptionGroup", "BaseExceptionGroup"}
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            if any(kind is None or dotted(kind).split(".")[-1] in broad for kind in caught):
                yield node
        elif isinstance(node, ast.Call) and dotted(node).endswith("suppress"):
            yield from [node] if broad & {dotted(argument) for argument in node.args} else []


def broad_excepts(
    sources: Sequence[Source], places: Mapping[str, int], hand_over: Collection[str]
) -> Iterator[Finding]:
    """Broad handlers outside `places` (path -> how many), and those that neither re-raise nor log and count.

    In `hand_over` files it is enough that the handler uses the exception: it passes it to who logs it.
    """
    for source in sources:
        allowed = next((count for place, count in places.items() if _inside(source.path, [place])), 0)
        for number, node in enumerate(broad_handlers(source)):
            if number >= allowed:
                yield source.at(node, "broad except in a place that is not named")
            elif isinstance(node, ast.Call) or not _honest(node, keeps=source.path in hand_over):
                yield source.at(node, "a broad except must log and count, or raise again")


def _honest(handler: ast.ExceptHandler, *, keeps: bool) -> bool:
    nodes = [node for statement in handler.body for node in ast.walk(statement)]
    calls = [dotted(node).lower() for node in nodes if isinstance(node, ast.Call)]
    logs = any("log" in call.rpartition(".")[0] for call in calls)
    counts = any(call.endswith(".inc") or "metrics." in call or "telemetry." in call for call in calls)
    used = any(isinstance(node, ast.Name) and node.id == handler.name for node in nodes)
    return any(isinstance(node, ast.Raise) for node in nodes) or (logs and counts) or (keeps and used)


def code(source: Source) -> str:
    """The source without comments and docstrings, which may speak of anything."""
    tree = ast.parse(source.text)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)):
            node.body = [line for line in node.body if not _is_string(line)] or [ast.Pass()]
    return ast.unparse(tree)


def _is_string(line: ast.stmt) -> bool:
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant) and isinstance(line.value.value, str)


def open_routes(routes: Iterable[Any], public: Collection[str]) -> Iterator[str]:
    """Paths that are not public and do not declare exactly one scope (`Requires`), however deep."""
    for route in mounted_routes(routes):
        if route.path not in public and len(list(required_scopes(getattr(route, "dependant", None)))) != 1:
            yield route.path


def mounted_routes(routes: Iterable[Any]) -> Iterator[Any]:
    """Every route as it is served.

    FastAPI keeps an included router as one entry; `effective_route_contexts` are its routes.
    """
    for route in routes:
        if hasattr(route, "effective_route_contexts"):
            yield from mounted_routes(route.effective_route_contexts())
            yield from mounted_routes(route.effective_low_priority_routes())
        else:
            yield route


def required_scopes(dependant: Any) -> Iterator[Scope]:
    """Every scope that a route's dependencies ask for."""
    for each in dependant.dependencies if dependant is not None else []:
        if isinstance(each.call, Requires):
            yield each.call.scope
        yield from required_scopes(each)
