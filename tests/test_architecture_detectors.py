"""The architecture rules can fail: each detector is shown bad snippets that it finds and good ones that it leaves."""

from typing import Annotated

import pytest
from fastapi import APIRouter, Depends, FastAPI

from service.api.deps import Requires, current_principal
from service.auth.principal import Principal, Scope
from tests import architecture
from tests.architecture import Source
from tests.test_architecture import ALLOWED_SIBLINGS, BROAD_EXCEPTS, FENCES, HAND_OVER, LAYERS, PUBLIC, check


def bad(text: str, path: str = "engine/bad.py") -> list[Source]:
    return [Source.parse(path, text)]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("errors.py", "from service.api import errors"),
        ("errors.py", "import service.settings"),
        ("engine/worker.py", "def f():\n    from service.auth.principal import Principal"),
        ("engine/worker.py", "from ..api.sse import DONE"),
        ("engine/worker.py", "from service import inference"),
        ("storage/keys.py", "from service.engine import engine"),
        ("observability/metrics.py", "import importlib\nimportlib.import_module('service.engine.engine')"),
        ("observability/log.py", "if TYPE_CHECKING:\n    from service.settings import Settings"),
        ("limits/rate.py", "from service.auth.jwt import verify"),
        ("bench/client.py", "from service.engine.engine import Engine"),
        ("bench/client.py", "from service.api.sse import DONE"),
        ("helpers.py", ""),
    ],
)
def test_an_import_that_points_up_or_sideways_is_found(path: str, text: str) -> None:
    assert list(architecture.layer_violations(bad(text, path), LAYERS, ALLOWED_SIBLINGS))


def test_imports_that_point_down_are_no_findings() -> None:
    text = (
        "from service import __version__\nfrom service.auth.principal import Principal\nfrom . import rate\nimport os"
    )
    check(architecture.layer_violations(bad(text, "limits/tokens.py"), LAYERS, ALLOWED_SIBLINGS))


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("engine/worker.py", "import mlx.core as mx"),
        ("engine/engine.py", "def f():\n    from mlx_lm.generate import BatchGenerator"),
        ("bench/client.py", "from mlx_lm.generate import BatchGenerator"),
        ("bench/report.py", "import matplotlib"),
        ("inference.py", "from fastapi import Depends"),
        ("api/health.py", "import uvicorn"),
        ("api/health.py", "import httptools"),
        ("auth/api_keys.py", "from jose import jwt"),
        ("auth/api_keys.py", "import sqlite3"),
        ("app.py", "from opentelemetry import trace"),
        ("api/rate.py", "from limits.strategies import MovingWindowRateLimiter"),
        ("app.py", "__import__('sqlalchemy')"),
    ],
)
def test_a_third_party_outside_its_fence_is_found(path: str, text: str) -> None:
    assert list(architecture.fence_violations(bad(text, path), FENCES))


@pytest.mark.parametrize(
    "text", ["import os\nos.environ['A']", "from os import getenv", "import os\ndef f():\n    return os.getenv('A')"]
)
def test_a_reader_of_the_environment_is_found(text: str) -> None:
    assert list(architecture.environment_readers(bad(text), ["settings.py"]))


def test_a_long_file_and_a_long_function_are_found() -> None:
    assert list(architecture.oversized(bad("pass\n" * 301), lines=300, function=40))
    assert list(architecture.oversized(bad("async def f():\n" + "    pass\n" * 40), lines=300, function=40))
    nested = "class A:\n    def f(self):\n        def g():\n" + "            pass\n" * 40
    assert len(list(architecture.oversized(bad(nested), lines=300, function=40))) == 2
    check(architecture.oversized(bad("def f():\n" + "    pass\n" * 39), lines=300, function=40))


@pytest.mark.parametrize(
    "text",
    [
        "seen = []",
        "table: dict[str, int] = {}",
        "names = {n for n in 'ab'}",
        "pair = ([], 1)",
        "cache = dict()",
        "router = APIRouter()",
        "limiter = Limiter(key_func=f)",
        "value = frozen if x else []",
        "if True:\n    seen = []",
        "try:\n    import a\nexcept ImportError:\n    seen = set()",
        "class A:\n    seen = []",
        "class A:\n    class B:\n        table: ClassVar[dict] = {}",
        "def f():\n    global x\n    x = 1",
        "@dataclass\nclass Box:\n    x: int\nbox = Box(1)",
    ],
)
def test_mutable_state_is_found(text: str) -> None:
    assert list(architecture.shared_state(bad(text)))


@pytest.mark.parametrize(
    "text",
    [
        "__all__ = ['a']",
        "names = frozenset({'a'})",
        "table = MappingProxyType({'a': 1})",
        "pattern = re.compile('a')",
        "Dep = Annotated[int, Depends(f)]",
        "log = get_logger(__name__)",
        "PAIR = (1, 'a')",
        "class A:\n    __slots__ = ['a']\n    model_config = {}\n    def f(self):\n        self.x = []",
        "@dataclass(frozen=True)\nclass Point:\n    x: int\nORIGIN = Point(0)",
        "def f():\n    seen = []\n    return seen",
    ],
)
def test_constants_are_no_findings(text: str) -> None:
    check(architecture.shared_state(bad(text)))


@pytest.mark.parametrize(
    ("path", "handler"),
    [
        ("inference.py", "except Exception:\n    log.error('x')\n    metrics.inc()"),
        ("inference.py", "except:\n    raise"),
        ("inference.py", "except (ValueError, Exception):\n    raise"),
        ("inference.py", "except* Exception:\n    pass"),
        ("auth/jwt.py", "except Exception:\n    pass"),
        ("auth/jwt.py", "except Exception:\n    log.error('x')"),
        ("auth/jwt.py", "except Exception:\n    metrics.errors.inc()"),
        ("auth/jwt.py", "except Exception:\n    raise\ntry:\n    pass\nexcept Exception:\n    raise"),
        ("engine/batches.py", "except Exception as error:\n    pass"),
        ("auth/jwt.py", "finally:\n    pass\nwith suppress(Exception):\n    pass"),
    ],
)
def test_a_broad_except_out_of_place_or_silent_is_found(path: str, handler: str) -> None:
    assert list(architecture.broad_excepts(bad(f"try:\n    pass\n{handler}", path), BROAD_EXCEPTS, HAND_OVER))


@pytest.mark.parametrize(
    "handler",
    [
        "except Exception:\n    self._log.error('x')\n    self._metrics.errors.inc()",
        "except BaseException:\n    raise",
        "except ValueError:\n    pass",
    ],
)
def test_an_honest_handler_in_its_place_is_no_finding(handler: str) -> None:
    check(architecture.broad_excepts(bad(f"try:\n    pass\n{handler}", "auth/jwt.py"), BROAD_EXCEPTS, HAND_OVER))


def test_the_search_ignores_docstrings_and_comments_only() -> None:
    (source,) = bad('"""[DONE] here"""\nx = "[DONE]"  # [DONE]\ndef f():\n    """[DONE]"""\n')
    assert architecture.code(source).count("[DONE]") == 1


MODELS, ADMIN = Depends(Requires(Scope.MODELS)), Depends(Requires(Scope.ADMIN))


def test_a_route_without_exactly_one_scope_is_found() -> None:
    async def deeper(_: Annotated[Principal, MODELS]) -> int:
        return 1

    app = FastAPI(openapi_url=None)
    guarded = APIRouter(dependencies=[MODELS])
    guarded.get("/guarded")(lambda: 1)
    guarded.get("/twice", dependencies=[ADMIN])(lambda: 1)
    open_one = APIRouter()
    open_one.get("/open")(lambda: 1)
    outer = APIRouter(prefix="/outer")
    outer.include_router(open_one)
    app.include_router(guarded)
    app.include_router(outer)
    app.get("/deep", dependencies=[Depends(deeper)])(lambda: 1)
    app.get("/somebody", dependencies=[Depends(current_principal)])(lambda: 1)
    app.get("/health")(lambda: 1)
    app.get("/plain")(lambda: 1)
    app.mount("/mounted", FastAPI())
    assert sorted(architecture.open_routes(app.routes, PUBLIC)) == [
        "/mounted",
        "/outer/open",
        "/plain",
        "/somebody",
        "/twice",
    ]


def test_the_pages_of_the_documentation_count_as_routes() -> None:
    assert "/openapi.json" in architecture.open_routes(FastAPI().routes, PUBLIC)
