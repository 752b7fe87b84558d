"""Which key a command of this machine shows to a service, and where the service is reached from here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from service.cli.context import explained

if TYPE_CHECKING:
    from service.settings import Settings


def reachable(host: str) -> str:
    """The address to ask where `host` is listened on."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - an address to ask, not to listen on


def key_for(settings: Settings, url: str | None, file: Path | None) -> str | None:
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
