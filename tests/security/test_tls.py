"""TLS of our own: a real certificate, real sockets, nothing older than 1.2."""

import ipaddress
import socket
import ssl
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from service.settings import ConfigurationError, Settings
from service.settings.tls import tls_context
from tests.fakes import FakeBackend, spelling
from tests.serving import Served, bearer, make_key, served


def certify(folder: Path) -> tuple[Path, Path]:
    """A self-signed certificate for this machine, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    made = made.not_valid_before(now).not_valid_after(now + timedelta(days=1)).add_extension(names, False)
    certificate, private = folder / "certificate.pem", folder / "key.pem"
    certificate.write_bytes(made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return certificate, private


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("tls")
    folder.chmod(0o700)
    certificate, key = certify(folder)
    given = {"server.port": 0, "server.state_dir": folder, "server.tls_certificate": certificate, "server.tls_key": key}
    return Settings.load(None, given)


@pytest.fixture(scope="module")
def secure(settings: Settings) -> Iterator[Served]:
    with served(settings, FakeBackend(script=spelling("hello there"))) as service:
        yield service


def speaking(version: ssl.TLSVersion) -> ssl.SSLContext:
    """A client that speaks `version` only, however weak that is."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = version
    return context


def connect(secure: Served, version: ssl.TLSVersion) -> str | None:
    """What is agreed upon with a client that speaks `version` only."""
    url = httpx.URL(secure.url)
    with (
        socket.create_connection((url.host, url.port or 0), timeout=10) as wire,
        speaking(version).wrap_socket(wire) as tls,
    ):
        return tls.version()


def agree(server: ssl.SSLContext, client: ssl.SSLContext) -> str | None:
    """A handshake in memory."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = server.wrap_bio(to_server, to_client, server_side=True)
    theirs = client.wrap_bio(to_client, to_server)
    for _ in range(4):
        for side in (theirs, ours):
            with suppress(ssl.SSLWantReadError):
                side.do_handshake()
    return ours.version()


def test_requests_and_streams_are_served(secure: Served, settings: Settings) -> None:
    trust = ssl.create_default_context(cafile=str(settings.server.tls_certificate))
    key = make_key(settings, "inference")
    assert secure.url.startswith("https://")
    with httpx.Client(base_url=secure.url, verify=trust, headers=bearer(key)) as client:
        assert client.get("/health").status_code == 200
        assert client.post("/generate", json={"prompt": "x"}).json()["text"] == "hello there"
        with client.stream("POST", "/generate", json={"prompt": "x", "stream": True}) as answer:
            assert list(answer.iter_lines())[-2] == "data: [DONE]"
        assert client.get("/v1/models", headers={"authorization": ""}).status_code == 401


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_what_is_new_enough_is_spoken(secure: Served, version: ssl.TLSVersion) -> None:
    assert connect(secure, version) == version.name.replace("_", ".")


OLD = pytest.mark.parametrize("name", ["TLSv1", "TLSv1_1"])
IS_OLD = pytest.mark.filterwarnings("ignore:ssl.TLSVersion")


@IS_OLD
@OLD
def test_what_is_older_is_not(secure: Served, name: str) -> None:
    with pytest.raises((ssl.SSLError, ConnectionError)):
        connect(secure, ssl.TLSVersion[name])


@IS_OLD
@OLD
def test_it_is_our_minimum_that_refuses_and_not_the_clients_library(settings: Settings, name: str) -> None:
    version = ssl.TLSVersion[name]
    context = tls_context(settings.server)
    assert context is not None
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    with pytest.raises(ssl.SSLError):
        agree(context, speaking(version))
    context.minimum_version = version
    assert agree(context, speaking(version)) == name.replace("_", ".")


def test_plain_http_is_not_answered(secure: Served) -> None:
    with pytest.raises(httpx.HTTPError):
        httpx.get(secure.url.replace("https", "http") + "/health")


@pytest.mark.parametrize("broken", ["missing", "not a certificate", "another key"])
def test_a_certificate_that_cannot_be_used_is_a_configuration_error(
    settings: Settings, tmp_path: Path, broken: str
) -> None:
    certificate, key = settings.server.tls_certificate, settings.server.tls_key
    if broken == "missing":
        certificate = tmp_path / "absent.pem"
    elif broken == "not a certificate":
        certificate = tmp_path / "text.pem"
        certificate.write_text("hello")
    else:
        _, key = certify(tmp_path)
    server = settings.server.model_copy(update={"tls_certificate": certificate, "tls_key": key})
    with pytest.raises(ConfigurationError, match=r"server\.tls_certificate"):
        tls_context(server)


def test_without_a_certificate_there_is_no_tls() -> None:
    assert tls_context(Settings().server) is None
