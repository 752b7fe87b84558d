"""The words of `mlxd bench`: options that its commands share, and what they are turned into. Exit code 2 for what
makes no sense."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from service.cli.reach import credential, reachable

if TYPE_CHECKING:
    from service.bench.client import Api, Target
    from service.bench.report import Setup
    from service.bench.series import Series
    from service.bench.workload import Workload
    from service.settings import Settings

Url = Annotated[str | None, typer.Option(help="Of the server; as configured when not given.")]
KeyFile = Annotated[Path | None, typer.Option(metavar="FILE", help="A key (0600) to show; the development key.")]
Model = Annotated[str, typer.Option(help="As the server calls it.")]
Route = Annotated[str, typer.Option("--api", metavar="chat|completions", help="The route of /v1 that is asked.")]
Streams = Annotated[str, typer.Option(metavar="N,...", help="Closed loop: so many at a time, one load after another.")]
Rate = Annotated[str, typer.Option(metavar="R,...", help="Open loop instead: so many a second on average (Poisson).")]
Requests = Annotated[int | None, typer.Option(min=1, help="Of each load; 8 for each stream.")]
Seconds = Annotated[float | None, typer.Option(min=0.001, help="A load begins nothing new after so long.")]
WarmUp = Annotated[int, typer.Option(min=0, help="Requests of each stream before it counts.")]
Prompt = Annotated[str, typer.Option("--prompt-words", metavar="N|A:B", help="Words of a prompt; A:B is log-uniform.")]
Output = Annotated[str, typer.Option("--output-tokens", metavar="N|A:B", help="The max_tokens of a request.")]
Shared = Annotated[int, typer.Option("--shared-prefix", min=0, help="Words of a system prompt that all share.")]
Turns = Annotated[int, typer.Option(min=1, max=1000, help="Of a conversation; each has all before it.")]
Sampling = Annotated[str, typer.Option(metavar="greedy|mixed", help="mixed: each request has its own parameters.")]
Tokens = Annotated[str, typer.Option(metavar="A:B", help="Prompts of token ids from A to B; for completions.")]
Body = Annotated[str, typer.Option(metavar="JSON", help="Fields for every request; null takes one out.")]
Seed = Annotated[int, typer.Option(help="The same seed asks the same, and may meet caches.")]
FirstToken = Annotated[float | None, typer.Option("--slo-ttft", help="Good: the first token within so many seconds.")]
Gap = Annotated[float | None, typer.Option("--slo-itl", help="Good: 99 % of its gaps within so many seconds.")]
Pid = Annotated[int | None, typer.Option(help="The server's process, to measure its CPU time.")]
Name = Annotated[str, typer.Option(help="Of the server, in files and plots.")]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the results there.")]
Plot = Annotated[Path | None, typer.Option("--plot", metavar="DIR", help="Draw PNGs there (extra `bench`).")]

Value = TypeVar("Value")


def one(option: str, text: str, convert: Callable[[str], Value]) -> Value:
    """The value of an option that `convert` may refuse by ValueError."""
    try:
        return convert(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


def several(option: str, text: str, convert: Callable[[str], Value]) -> list[Value]:
    """The values of a list with commas."""
    return [one(option, part, convert) for part in text.split(",")]


def count(text: str) -> int:
    """A whole number above 0. Raises ValueError."""
    if (value := int(text)) < 1:
        raise ValueError(f"{text} is not above 0")
    return value


def refuse_given(context: typer.Context) -> None:
    """Options of `bench` before one of its commands would be for nothing."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is not None and source.name == "COMMANDLINE":
            where = f"belongs after `{context.invoked_subcommand}`, if anywhere"
            raise typer.BadParameter(where, param_hint=parameter.opts[0])


def target(settings: Settings, *, url: str | None, key_file: Path | None, model: str, api: str) -> Target:
    """Who is asked. Without a URL the service that is configured."""
    from service.bench.client import Api, BadTarget, Client, Target

    found = Target(url=url or _configured(settings), api=one("--api", api, Api), model=model)
    try:
        Client(found)
    except BadTarget as error:
        raise typer.BadParameter(str(error), param_hint="--url") from None
    return replace(found, key=credential(settings, url, key_file))


def _configured(settings: Settings) -> str:
    from service.console import url

    server = settings.server
    if not server.port:
        raise typer.BadParameter("the configured port is a free one, so nobody knows it", param_hint="--url")
    return url(reachable(server.host), server.port, tls=server.tls_certificate is not None)


def series(
    *, streams: str, rate: str, requests: int | None, seconds: float | None, warm_up: int, pid: int | None
) -> Series:
    """The loads."""
    from service.bench.load import Arrivals
    from service.bench.series import Series

    if rate:
        arrivals = [Arrivals(rate=each) for each in several("--rate", rate, _rate)]
    else:
        arrivals = [Arrivals(streams=each) for each in several("--streams", streams, count)]
    return Series(arrivals=arrivals, conversations=requests, seconds=seconds, warm_up=warm_up, pid=pid)


def _rate(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError(f"{text} is not above 0")
    return value


def workload(
    *, prompt: str, output: str, shared: int, turns: int, sampling: str, tokens: str, seed: int, body: str, api: str
) -> Workload:
    """What is asked."""
    from service.bench.client import Api
    from service.bench.workload import Lengths, Mix, Workload

    ids = one("--tokens", tokens, Lengths.parse) if tokens else None
    if ids is not None and (turns > 1 or api != Api.COMPLETIONS):
        raise typer.BadParameter("wants --api completions, and one turn", param_hint="--tokens")
    return Workload(
        prompt=one("--prompt-words", prompt, Lengths.parse),
        output=one("--output-tokens", output, Lengths.parse),
        shared_prefix=shared,
        turns=turns,
        mix=one("--sampling", sampling, Mix),
        ids=None if ids is None else (ids.least, ids.most),
        seed=seed,
        extra=one("--body", body, _object) if body else {},
    )


def route(text: str) -> Api:
    """One of the routes."""
    from service.bench.client import Api

    return one("--api", text, Api)


def _object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("is no JSON object")  # noqa: TRY004 - a value of the command line
    return value


def setup(name: str, target: Target, workload: Workload, *, first_token: float | None, gap: float | None) -> Setup:
    """All that a file of results says of itself."""
    from service.bench.report import Setup
    from service.bench.summary import Objective

    objective = Objective(first_token=first_token, gap=gap)
    return Setup(name=name or target.url, target=target, workload=workload, objective=objective)
