"""What the generation thread counts, over a backend whose steps take scripted time."""

import pytest

from tests.timed import ByHand, TimedBackend

PREFILL, DECODE_ONE, DECODE_TWO = 0.004, 0.011, 0.012


def of(driven: ByHand, name: str, **labels: str) -> float:
    found = driven.metrics.registry.get_sample_value(f"mlxd_{name}", labels)
    assert found is not None
    return found


def test_each_token_but_a_row_s_first_has_a_gap_and_each_step_a_duration() -> None:
    driven = ByHand(TimedBackend())
    driven.submit(prompt=4, max_tokens=3)
    driven.finish()
    assert of(driven, "inter_token_latency_seconds_count") == 2
    assert of(driven, "inter_token_latency_seconds_sum") == pytest.approx(2 * DECODE_ONE)
    assert of(driven, "engine_step_duration_seconds_count") == 4
    assert of(driven, "engine_step_duration_seconds_sum") == pytest.approx(PREFILL + 3 * DECODE_ONE)
    assert of(driven, "engine_step_rows_bucket", le="0.0") == 1
    assert of(driven, "engine_step_rows_sum") == 3


def test_a_gap_holds_the_prompt_that_was_read_meanwhile() -> None:
    driven = ByHand(TimedBackend())
    driven.submit("a", prompt=4, max_tokens=3)
    driven.turn(2)  # its prompt, its first token
    driven.submit("b", prompt=4, max_tokens=1)
    driven.turn(2)  # a token beside the other's prompt, a token of each
    assert of(driven, "inter_token_latency_seconds_count") == 2
    assert of(driven, "inter_token_latency_seconds_sum") == pytest.approx(PREFILL + DECODE_ONE + DECODE_TWO)
    assert of(driven, "generation_tokens_total") == 4
    assert driven.worker.books() == (0, 0)


def test_a_row_that_was_cancelled_has_no_gap_any_more() -> None:
    driven = ByHand(TimedBackend())
    generation = driven.submit(prompt=4, max_tokens=100)
    driven.turn(3)
    assert of(driven, "inter_token_latency_seconds_count") == 1
    held, reserved = driven.worker.books()
    assert (held, reserved > 0) == (1, True)
    generation.close()
    driven.turn()
    assert of(driven, "inter_token_latency_seconds_count") == 1
    assert driven.worker.books() == (0, 0)


def test_what_the_prefix_cache_has_of_a_prompt_is_a_hit() -> None:
    driven = ByHand(TimedBackend(cached=lambda row: len(row.prompt) // 2))
    driven.submit(prompt=8, max_tokens=1)
    driven.finish()
    assert of(driven, "prefix_cache_queries_total") == of(driven, "prompt_tokens_total") == 8
    assert of(driven, "prefix_cache_hits_total") == of(driven, "prompt_tokens_cached_total") == 4
