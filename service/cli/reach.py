"""How commands reach a running service: where it is, as whom, and its `/admin` calls."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli.context import explained

if TYPE_CHECKING:
    import httpx

    from service.settings import Settings

TIMEOUT = 10.0
"""Seconds for one answer."""

Url = Annotated[str | None, typer.Option(help="Of the service; as configured when not given.")]
KeyFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="A key (0600) with the scope admin; the development key.")
]


def configured(settings: Settings) -> str:
    """Where the configuration says that the service is: the operator's listener, if its port is known."""
    from service.console import url

    ops, server = settings.ops, settings.server
    tls = server.tls_certificate is not None
    host, port = ops.address or ("", 0)
    if port:
        return url(reachable(host), port, tls=tls and not ops.loopback)
    if server.port:
        return url(reachable(server.host), server.port, tls=tls)
    raise typer.BadParameter("the configured ports are free ones, so nobody knows them", param_hint="--url")


def reachable(host: str) -> str:
    """The address to ask where `host` is listened on."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - an address to ask, not to listen on


def credential(settings: Settings, url: str | None, file: Path | None) -> str | None:
    """The key of the file; else the development key, which goes to this machine only."""
    import httpx

    from service.auth.development import FILE_NAME
    from service.settings import is_loopback, read_private

    if file is None and not (settings.auth.enabled and (url is None or is_loopback(httpx.URL(url).host))):
        return None
    try:
        with explained():
            return read_private(file or settings.server.state_dir / FILE_NAME).decode("ascii").strip()
    except FileNotFoundError:
        if file is None:
            return None
        raise typer.BadParameter(f"there is no {file}", param_hint="--key-file") from None
    except UnicodeDecodeError:
        raise typer.BadParameter("is no key", param_hint="--key-file") from None


class Unanswered(Exception):
    """There is no answer to go by, and why; `for_good`: asking again would not help."""

    def __init__(self, why: str, *, for_good: bool = False) -> None:
        super().__init__(why)
        self.for_good = for_good


class AdminApi:
    """The `/admin` calls of the service at `url`. Raises httpx.InvalidURL when it is made."""

    def __init__(self, url: str, key: str | None, *, transport: httpx.BaseTransport | None = None) -> None:
        import ssl

        import httpx

        self._client = httpx.Client(
            base_url=url,
            headers={} if key is None else {"authorization": f"Bearer {key}"},
            timeout=TIMEOUT,
            transport=transport,
            trust_env=False,  # a proxy would get the key
            verify=ssl.create_default_context(),
        )

    def close(self) -> None:
        """Let the connection go."""
        self._client.close()

    def call(self, method: str, path: str) -> dict[str, Any]:
        """The JSON object of a 2xx answer. Raises Unanswered."""
        import httpx

        try:
            answer = self._client.request(method, path)
        except httpx.HTTPError as error:
            raise Unanswered(f"cannot be reached: {error}" if str(error) else type(error).__name__) from None
        body = _object(answer)
        if not answer.is_success:
            raise _refusal(answer, body)
        return body


def _object(answer: httpx.Response) -> dict[str, Any]:
    try:
        body = answer.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise Unanswered(f"answers {answer.status_code} without JSON; is it mlxd?", for_good=True)
    return body


def _refusal(answer: httpx.Response, body: dict[str, Any]) -> Unanswered:
    from httpx import codes

    match answer.status_code:
        case 401:
            return Unanswered("a key is needed, or this one is refused (401): --key-file FILE", for_good=True)
        case 403:
            return Unanswered("the key lacks the scope `admin` (403)", for_good=True)
        case status:
            error = body.get("error")
            message = error.get("message", "refused") if isinstance(error, dict) else "refused"
            passing = answer.is_server_error or status == codes.TOO_MANY_REQUESTS
            return Unanswered(f"{message} ({status})", for_good=not passing)


@contextmanager
def admin_api(
    settings: Settings, url: str | None, key_file: Path | None
) -> Iterator[Callable[[str, str], dict[str, Any]]]:
    """`AdminApi.call` of the service that is meant. What goes unanswered ends the command: 69, or 1 where for good."""
    import httpx

    where = url or configured(settings)
    try:
        api = AdminApi(where, credential(settings, url, key_file))
    except httpx.InvalidURL as error:
        raise typer.BadParameter(str(error), param_hint="--url") from None
    try:
        yield api.call
    except Unanswered as unanswered:
        typer.echo(f"mlxd: {where}: {unanswered}", err=True)
        raise typer.Exit(1 if unanswered.for_good else os.EX_UNAVAILABLE) from None
    finally:
        api.close()
