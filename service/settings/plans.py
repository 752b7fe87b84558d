"""What each plan may take. A number that is no positive number is an error at load, never "unlimited"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Protocol

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError

from service.settings.base import Group, SecretFile
from service.settings.issuers import PlanName

DEFAULT = "default"
"""The plan of whoever has none by name; it always exists."""

MAX_AMOUNT = 2**53
"""Beyond it a float, and JSON in many languages, has no whole numbers."""


def _number(value: object) -> object:
    """True counts as 1 for pydantic; as a limit it is a mistake."""
    if isinstance(value, bool):
        raise ValueError("must be a number")  # noqa: TRY004 - pydantic reports ValueError
    return value


Amount = Annotated[int, BeforeValidator(_number), Field(ge=1, le=MAX_AMOUNT)]
PerMinute = Annotated[int, BeforeValidator(_number), Field(ge=1, le=1_000_000)]
Quota = Amount | Literal["unlimited"]


class Subscriber(Protocol):
    """Whoever limits belong to: a principal."""

    @property
    def plan(self) -> str: ...

    @property
    def limits(self) -> Mapping[str, int]: ...


class PlanError(Exception):
    """A principal whose limits cannot be told, so that nothing may be allowed. `reason` is for the operator.

    `unknown_plan`: no such plan in the configuration. `bad_override`: a number of its own that no plan could have.
    """

    def __init__(self, reason: Literal["unknown_plan", "bad_override"], detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


class PlanSettings(Group):
    requests_per_minute: PerMinute = Field(600, description="Requests in any minute.")
    request_burst: PerMinute = Field(100, description="Requests in any second, as far as a minute's allow.")
    tokens_per_minute: Amount = Field(
        2_000_000, description="Tokens, of prompt and output together: refilled by the second, kept up to a minute's."
    )
    concurrent_requests: Amount = Field(256, description="Requests that wait or run at the same time.")
    max_prompt_tokens: Amount = Field(1_000_000, description="Most tokens of one prompt.")
    max_output_tokens: Amount = Field(1_000_000, description="Largest max_tokens; engine.max_output_tokens holds too.")
    weight: Annotated[float, BeforeValidator(_number)] = Field(
        1.0, ge=0.01, le=100, description="Share of a busy engine, against other principals."
    )
    request_timeout: Annotated[float, BeforeValidator(_number)] = Field(
        3600.0, gt=0, le=86_400, description="Seconds a request may take; engine.request_timeout holds too."
    )
    daily_tokens: Quota = Field("unlimited", description='Tokens in a day (UTC), or "unlimited".')
    monthly_tokens: Quota = Field("unlimited", description='Tokens in a calendar month (UTC), or "unlimited".')


def _with_default(plans: Mapping[str, PlanSettings]) -> Mapping[str, PlanSettings]:
    return {DEFAULT: PlanSettings(), **plans}


class LimitsSettings(Group):
    plans: Annotated[Mapping[PlanName, PlanSettings], AfterValidator(_with_default)] = Field(
        {}, description="Plans by name, each a table `[limits.plans.NAME]`; docs/limits.md has its keys."
    )
    failed_authentication_per_minute: PerMinute = Field(
        60, description="Failed credentials from one address (IPv6: one /64) in a minute; beyond it 429."
    )
    redis_url_file: SecretFile = Field(
        None, description="File (0600) with the URL of the Redis that several instances share; empty: none."
    )
    redis_timeout: float = Field(0.1, gt=0, le=0.1, description="Seconds that a request waits for Redis, at most.")
    redis_retry_interval: float = Field(
        1.0, ge=0.1, le=60, description="Seconds between two attempts to reach a Redis that failed."
    )

    def for_principal(self, principal: Subscriber) -> PlanSettings:
        """The principal's plan with its own numbers. Raises PlanError: nothing is then known to be allowed."""
        plan = self.plans.get(principal.plan)
        if plan is None:
            raise PlanError("unknown_plan", principal.plan)
        if not principal.limits:
            return plan
        try:
            return PlanSettings.model_validate({**plan.model_dump(), **principal.limits})
        except ValidationError as error:
            raise PlanError("bad_override", ", ".join(sorted(str(each["loc"][0]) for each in error.errors()))) from None
