"""`mlxd bench`: put a load on a server and measure it as its clients do; what there is without one; plots."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli import bench_options as options
from service.cli.context import load_settings, prepare

if TYPE_CHECKING:
    from service.bench.ceiling import Lap
    from service.bench.report import Report, Setup
    from service.bench.series import Series
    from service.bench.summary import Summary
    from service.bench.workload import Workload
    from service.settings import Settings

ENGINE_SCHEMA = "mlxd-bench-engine/1"
ROWS_EACH = 4
"""Rows of a lap for each stream, where nothing says how many."""


def commands() -> typer.Typer:
    """`bench`, which is a command and has others below it."""
    app = typer.Typer(name="bench", rich_markup_mode=None, invoke_without_command=True, callback=bench)
    app.command("engine")(engine)
    app.command("plot")(plot)
    return app


def bench(
    context: typer.Context,
    *,
    url: options.Url = None,
    key_file: options.KeyFile = None,
    model: options.Model = "default",
    api: options.Route = "chat",
    streams: options.Streams = "1",
    rate: options.Rate = "",
    requests: options.Requests = None,
    seconds: options.Seconds = None,
    warm_up: options.WarmUp = 1,
    prompt: options.Prompt = "128",
    output: options.Output = "128",
    shared: options.Shared = 0,
    turns: options.Turns = 1,
    sampling: options.Sampling = "greedy",
    tokens: options.Tokens = "",
    body: options.Body = "",
    seed: options.Seed = 0,
    slo_ttft: options.FirstToken = None,
    slo_itl: options.Gap = None,
    pid: options.Pid = None,
    name: options.Name = "",
    json_file: options.JsonFile = None,
    plots: options.Plot = None,
) -> None:
    """Put a load on an OpenAI-compatible server and measure it as its clients do."""
    if context.invoked_subcommand is not None:
        return options.refuse_given(context)
    work = options.workload(
        prompt=prompt, output=output, shared=shared, turns=turns, sampling=sampling, tokens=tokens, seed=seed,
        body=body, api=api,
    )  # fmt: skip
    series = options.series(streams=streams, rate=rate, requests=requests, seconds=seconds, warm_up=warm_up, pid=pid)
    target = options.target(load_settings(context), url=url, key_file=key_file, model=model, api=api)
    return _run(series, options.setup(name, target, work, first_token=slo_ttft, gap=slo_itl), json_file, plots)


def _run(series: Series, setup: Setup, json_file: Path | None, plots: Path | None) -> None:
    """Carry out the loads and show what came of them. Exit code 69 when not one request ended well."""
    from datetime import UTC, datetime

    from rich.console import Console

    from service.bench.report import as_json, parse
    from service.cli.bench_view import errors_of, loads_table

    if plots is not None:
        _plotter()  # rather now than after the run
    made_at = datetime.now(UTC).isoformat(timespec="seconds")
    loads = _measured(series, setup)
    Console().print(loads_table(loads))
    for line in errors_of(loads):
        typer.echo(f"mlxd: {line}", err=True)
    text = json.dumps(as_json(setup, loads, made_at=made_at), indent=1)
    if json_file is not None:
        _write(json_file, text)
    if plots is not None:
        _draw([parse(text)], plots)
    if all(load.requests == load.failed for load in loads):
        raise typer.Exit(os.EX_UNAVAILABLE)


def _measured(series: Series, setup: Setup) -> list[Summary]:
    import asyncio

    import uvloop

    from service.bench.series import measure
    from service.cli.bench_view import bar
    from service.observability.process import NoSuchProcess

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(measure(series, setup, bar))
    except NoSuchProcess as error:
        raise typer.BadParameter(str(error), param_hint="--pid") from None


def engine(
    context: typer.Context,
    *,
    streams: options.Streams = "1",
    requests: Annotated[int | None, typer.Option(min=1, help="Rows of each lap; 4 for each stream.")] = None,
    rounds: Annotated[int, typer.Option(min=1, max=100, help="Laps of each engine, taken in turn.")] = 3,
    api: options.Route = "chat",
    prompt: options.Prompt = "128",
    output: options.Output = "128",
    shared: options.Shared = 0,
    sampling: options.Sampling = "greedy",
    tokens: options.Tokens = "",
    seed: options.Seed = 0,
    json_file: options.JsonFile = None,
) -> None:
    """Load the configured model here and measure mlx-lm alone, and mlxd's engine, without a service.

    The prompts are those of `mlxd bench` with the same options; parameters and ends of outputs are too.
    """
    work = options.workload(
        prompt=prompt, output=output, shared=shared, turns=1, sampling=sampling, tokens=tokens, seed=seed,
        body="", api=api,
    )  # fmt: skip
    at_a_time = options.several("--streams", streams, options.count)
    settings = load_settings(context)
    if max(at_a_time) > settings.engine.max_rows:
        raise typer.BadParameter("more than engine.max_rows", param_hint="--streams")
    prepare(settings)
    from service.serve import leave_now

    laps = _laps(
        settings, work, options.route(api), [(each, requests or ROWS_EACH * each) for each in at_a_time], rounds
    )
    _show_laps(laps, json_file)
    leave_now(0)  # mlx aborts now and then while the interpreter finalises


def _laps(settings: Settings, work: Workload, api: Any, loads: Sequence[tuple[int, int]], rounds: int) -> list[Lap]:
    from contextlib import closing

    from service.bench.ceiling import Ceiling
    from service.errors import ModelUnavailable

    try:
        with closing(Ceiling(settings, work, api)) as ceiling:
            return [lap for streams, rows in loads for lap in ceiling.laps(streams, rows, rounds)]
    except ModelUnavailable as error:
        typer.echo(f"mlxd: {error.message}", err=True)
        raise typer.Exit(os.EX_UNAVAILABLE) from None


def _show_laps(laps: Sequence[Lap], json_file: Path | None) -> None:
    from rich.console import Console

    from service.bench.ceiling import standings
    from service.cli.bench_view import standings_table

    found = standings(laps)
    Console().print(standings_table(found))
    if json_file is not None:
        value = {
            "schema": ENGINE_SCHEMA,
            "standings": [asdict(each) for each in found],
            "laps": [asdict(lap) for lap in laps],
        }
        _write(json_file, json.dumps(value, indent=1))


def plot(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Results of `mlxd bench --json`.")],
    *,
    folder: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the PNGs go.")] = Path(),
) -> None:
    """Draw results side by side: latency and goodput against load, and how gaps are distributed."""
    from service.bench.report import NotAReport, parse

    reports = []
    for file in files:
        try:
            reports.append(parse(file.read_text("utf-8")))
        except (OSError, UnicodeDecodeError, NotAReport) as error:
            raise typer.BadParameter(f"{file}: {error}", param_hint="FILE") from None
    _draw(reports, folder)


def _plotter() -> Any:
    """The module that draws; without matplotlib a line that says what to install, and exit code 2."""
    try:
        from service.bench import plots
    except ModuleNotFoundError:
        typer.echo("mlxd: plots need matplotlib: pip install 'mlxd[bench]'", err=True)
        raise typer.Exit(2) from None
    return plots


def _draw(reports: Sequence[Report], folder: Path) -> None:
    try:
        for path in _plotter().draw(reports, folder):
            typer.echo(f"mlxd: wrote {path}", err=True)
    except OSError as error:
        raise _unwritable(error) from None


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text + "\n", "utf-8")
    except OSError as error:
        raise _unwritable(error) from None


def _unwritable(error: OSError) -> typer.Exit:
    typer.echo(f"mlxd: cannot be written: {error}", err=True)
    return typer.Exit(os.EX_CANTCREAT)
