from pathlib import Path
from typing import Any

import pytest

from service.settings import ConfigurationError, Settings


def refusal(**values: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        Settings.load(None, {name.replace("__", "."): value for name, value in values.items()})
    return str(caught.value)


@pytest.mark.parametrize(
    ("bind", "address", "loopback"),
    [
        ("127.0.0.1:8001", ("127.0.0.1", 8001), True),
        ("127.0.0.1:0", ("127.0.0.1", 0), True),
        ("[::1]:65535", ("::1", 65535), True),
        ("localhost:9001", ("localhost", 9001), True),
        ("", None, True),
        ("0.0.0.0:8001", ("0.0.0.0", 8001), False),
        ("[::]:8001", ("::", 8001), False),
        ("10.0.0.5:8001", ("10.0.0.5", 8001), False),
    ],
)
def test_an_address_is_a_host_and_a_port(bind: str, address: tuple[str, int] | None, loopback: bool) -> None:
    proxy = {"server.trusted_proxies": ["10.0.0.0/8"]}
    ops = Settings.load(None, {"ops.bind": bind, **proxy}).ops
    assert (ops.address, ops.loopback) == (address, loopback)


@pytest.mark.parametrize(
    "bind", ["8001", ":8001", "127.0.0.1", "127.0.0.1:", "127.0.0.1:x", "::1:8001", "[::1]", "a b:1", "http://x:1"]
)
def test_what_is_no_address_is_refused(bind: str) -> None:
    assert refusal(ops__bind=bind) == "ops.bind: must be ADDRESS:PORT, as 127.0.0.1:8001 or [::1]:8001"


def test_a_port_has_16_bits() -> None:
    assert refusal(ops__bind="127.0.0.1:65536") == "ops.bind: the port must be at most 65535"


def test_beyond_loopback_the_rules_of_the_public_address_hold(tmp_path: Path) -> None:
    bind = {"ops.bind": "10.0.0.5:8001"}
    assert refusal(**bind).startswith("ops.bind: beyond loopback give server.tls_certificate")
    proxy = {"server.trusted_proxies": ["10.0.0.0/8"]}
    tls = {"server.tls_certificate": tmp_path / "c", "server.tls_key": tmp_path / "k"}
    for safe in (proxy, tls):
        assert Settings.load(None, {**bind, **safe}).ops.bind == "10.0.0.5:8001"
        assert refusal(**bind, **safe, auth__enabled=False) == "ops.bind: beyond loopback auth.enabled must be true"
        text = refusal(**bind, **safe, auth__development_key=True)
        assert text == "auth.development_key: for loopback addresses only"


def test_both_listeners_cannot_have_one_address() -> None:
    assert refusal(server__port=8001) == (
        "ops.bind: is the address of server.host and server.port; give it another port"
    )
    assert Settings.load(None, {"server.port": 0, "ops.bind": "127.0.0.1:0"}).ops.address == ("127.0.0.1", 0)
