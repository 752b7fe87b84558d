"""The picture of `mlxd top` in the README: `python -m tests.load.top_picture` runs a real service with the demo model,
lets three tenants ask it for half a minute, and saves what `mlxd top` shows of it then as `docs/top.svg`.
"""

from __future__ import annotations

import asyncio
import io
import json
import re
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console

from service.cli.top import WINDOW, Source
from service.cli.top_frame import Frame, frame
from service.cli.top_view import draw
from service.engine.models import resolve
from service.settings import Settings
from tests.serving import Running, bearer, make_key, started

ROOT = Path(__file__).parent.parent.parent
PICTURE = ROOT / "docs" / "top.svg"
INTERVAL = 2.0
STORY = "Once there was a lighthouse keeper who wrote down every ship that passed. " * 8

PLANS: Mapping[str, Mapping[str, int]] = {
    "default": {"requests_per_minute": 600, "request_burst": 600, "tokens_per_minute": 1_000_000},
    "small": {"requests_per_minute": 6, "request_burst": 2},
}
TENANTS = (  # name, plan, clients at a time, prompt, tokens of output
    ("research", "default", 4, STORY, 60),
    ("assistant", "default", 6, "Name three colours.", 30),
    ("batch", "small", 3, "Write a line about the sea.", 40),
)


async def ask(url: str, key: str, prompt: str, max_tokens: int, until: float) -> None:
    """One client: a request after the other, and a pause where it is refused."""
    async with httpx.AsyncClient(base_url=url, headers=bearer(key), timeout=120) as http:
        number = 0
        while time.monotonic() < until:
            number += 1
            body = {"prompt": f"{prompt} ({number})", "max_tokens": max_tokens, "temperature": 0.8}
            answer = await http.post("/generate", json=body)
            if answer.status_code != httpx.codes.OK:
                await asyncio.sleep(1)


async def load(url: str, keys: Mapping[str, str], seconds: float) -> None:
    """Everybody at once."""
    until = time.monotonic() + seconds
    asking = [
        ask(url, keys[name], prompt, max_tokens, until)
        for name, _, clients, prompt, max_tokens in TENANTS
        for _ in range(clients)
    ]
    await asyncio.gather(*asking)


async def watch(running: Running, keys: Mapping[str, str], source: Source) -> Frame:
    """What `mlxd top` knows after a while under load."""
    asking = asyncio.create_task(load(running.url, keys, 5 + WINDOW + INTERVAL))
    looks = []
    for pause in (5, WINDOW - INTERVAL, INTERVAL):
        await asyncio.sleep(pause)
        looks.append(await asyncio.to_thread(source.look))
    found = frame(*looks, now=time.time())
    await asking
    return found


def picture(found: Frame) -> str:
    """As SVG. Without rich's fonts from a CDN: what shows it has a monospaced one."""
    console = Console(record=True, width=100, file=io.StringIO(), force_terminal=True)
    console.print(draw(found, "http://127.0.0.1:8001"))
    plain = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    return console.export_svg(title="mlxd top", code_format=plain, unique_id="top")


def main() -> int:
    model = resolve("demo", state_dir=ROOT / ".state", offline=False).path
    with tempfile.TemporaryDirectory() as folder:
        given: dict[str, Any] = {"server.state_dir": Path(folder), "limits.plans": PLANS}
        settings = Settings.load(None, given)
        outside = {
            "MLXD_MODEL__REFERENCE": str(model),
            "MLXD_AUTH__ENABLED": "true",
            "MLXD_LIMITS__PLANS": json.dumps(PLANS),
        }
        with started(Path(folder), timed=True, **outside) as running:
            keys = {name: make_key(settings, "inference", tenant=name, plan=plan).text for name, plan, *_ in TENANTS}
            source = Source(running.url, make_key(settings, "metrics").text)
            time.sleep(1)  # keys are read four times a second
            found = asyncio.run(watch(running, keys, source))
            source.close()
    PICTURE.write_text(picture(found), "utf-8")
    Console().print(draw(found, "http://127.0.0.1:8001"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
