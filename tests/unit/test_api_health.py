import pytest

from service.engine.engine import EngineState
from service.observability.exposition import TEXT
from tests.fakes_api import Client, Service

pytestmark = pytest.mark.anyio

PROBES = ("/health", "/livez", "/readyz")


async def test_health_is_exactly_this_when_requests_would_be_served() -> None:
    answer = await Client(Service()).get("/health")
    assert (answer.status, answer.body) == (200, b'{"status":"ok","model_loaded":true}')


@pytest.mark.parametrize(
    ("state", "loaded"),
    [
        (EngineState.STARTING, False),
        (EngineState.WARMING, True),
        (EngineState.DRAINING, True),
        (EngineState.STOPPED, True),
        (EngineState.FAILED, True),
    ],
)
async def test_health_is_503_with_the_same_fields_otherwise(state: EngineState, loaded: bool) -> None:
    service = Service()
    service.engine.state = state
    service.engine.detail = "because"
    if not loaded:
        service.engine.info = None
    gone = state in (EngineState.STOPPED, EngineState.FAILED)
    answer = await Client(service).get("/health")
    assert (answer.status, answer.json()) == (503, {"status": state.value, "model_loaded": loaded and not gone})
    ready = await Client(service).get("/readyz")
    assert (ready.status, ready.json()["ready"], ready.json()["state"]) == (503, False, state.value)
    assert ready.json()["reasons"] == [f"the engine is {state.value}", "because"]
    assert (await Client(service).get("/livez")).status == 200


async def test_a_full_queue_is_busy_and_healthy() -> None:
    service = Service()
    service.engine.waiting = 10_000
    service.engine.running = 32
    for path in PROBES:
        assert (await Client(service).get(path)).status == 200
    assert (await Client(service).get("/readyz")).json()["waiting"] == 10_000


async def test_stuck_is_not_busy_and_not_ready_before_the_watchdog_ends_it() -> None:
    service = Service()
    service.engine.waiting = 10_000
    for age, status in ((None, 200), (29.9, 200), (30.1, 503)):
        service.engine.progress_age = age
        for path in ("/health", "/readyz"):
            assert (await Client(service).get(path)).status == status
    assert (await Client(service).get("/health")).json() == {"status": "stalled", "model_loaded": True}
    ready = (await Client(service).get("/readyz")).json()
    assert (ready["reasons"], ready["state"]) == (["the engine has made no progress for 30 s"], "ready")
    assert (ready["progress_age_seconds"], ready["event_loop_age_seconds"]) == (30.1, 0.0)
    assert (await Client(service).get("/livez")).status == 200
    metrics = (await Client(service).get("/metrics")).body.decode().splitlines()
    assert "mlxd_engine_progress_age_seconds 30.1" in metrics
    assert "mlxd_event_loop_heartbeat_age_seconds 0.0" in metrics


async def test_readiness_says_when_the_model_serves_one_at_a_time() -> None:
    service = Service()
    assert service.engine.info is not None
    service.engine.info.batchable = False
    answer = (await Client(service).get("/readyz")).json()
    assert (answer["batching"], answer["ready"], answer["reasons"], answer["step_age_seconds"]) == (
        False,
        True,
        [],
        0.25,
    )
    service.engine.info = None
    assert (await Client(service).get("/readyz")).json()["batching"] is None


@pytest.mark.parametrize("path", ["/", *PROBES, "/metrics", "/v1/models", "/v1/models/default"])
async def test_head_is_answered(path: str) -> None:
    assert (await Client(Service()).request("HEAD", path)).status == 200


async def test_metrics_show_the_engine_as_it_is_now() -> None:
    service = Service()
    service.engine.running = 3
    service.engine.state = EngineState.DRAINING
    answer = await Client(service).get("/metrics")
    assert (answer.status, answer.headers["content-type"]) == (200, TEXT)
    lines = answer.body.decode().splitlines()
    assert "mlxd_num_requests_running 3.0" in lines
    assert "mlxd_memory_active_bytes 10.0" in lines
    assert "mlxd_prefix_cache_bytes 4.0" in lines
    assert "mlxd_engine_step_age_seconds 0.25" in lines
    assert 'mlxd_engine_state{state="draining"} 1.0' in lines
    assert 'mlxd_engine_state{state="ready"} 0.0' in lines
