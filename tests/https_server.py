"""An https server on loopback that answers as a test tells it, byte by byte, with an authority of its own."""

import asyncio
import datetime as dt
import ipaddress
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

HOST = "issuer.test"
Behaviour = Callable[[asyncio.StreamWriter], Awaitable[None]]


def response(body: bytes, status: str = "200 OK", *headers: str) -> Behaviour:
    """Answer with this, then close."""
    head = "\r\n".join([f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""])

    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(head.encode() + body)
        await writer.drain()

    return answer


@dataclass
class HttpsServer:
    """`heads` are the request heads it got, `names` the server names (SNI) that were asked for."""

    port: int
    authorities: Path
    behaviour: Behaviour
    heads: list[str] = field(default_factory=list)
    names: list[str | None] = field(default_factory=list)
    connections: int = 0

    @property
    def url(self) -> str:
        return f"https://{HOST}:{self.port}/keys?set=1"


def make_certificates(folder: Path) -> tuple[Path, Path]:
    """PEM files: the authority's certificate, and a server's chain with its key for HOST, localhost and 127.0.0.1."""
    now = dt.datetime.now(dt.UTC)
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Authority of the tests")])
    names: list[x509.GeneralName] = [x509.DNSName(HOST), x509.DNSName("localhost")]
    names.append(x509.IPAddress(ipaddress.IPv4Address("127.0.0.1")))

    def builder(subject: x509.Name, public: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        made = x509.CertificateBuilder().subject_name(subject).issuer_name(ca_name).public_key(public)
        made = made.serial_number(x509.random_serial_number())
        return made.not_valid_before(now - dt.timedelta(1)).not_valid_after(now + dt.timedelta(1))

    authority = builder(ca_name, ca_key.public_key()).add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
    server = builder(x509.Name([]), key.public_key()).add_extension(x509.SubjectAlternativeName(names), True)
    ca_file, chain_file = folder / "authority.pem", folder / "server.pem"
    ca_file.write_bytes(authority.sign(ca_key, hashes.SHA256()).public_bytes(Encoding.PEM))
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    chain_file.write_bytes(private + server.sign(ca_key, hashes.SHA256()).public_bytes(Encoding.PEM))
    return ca_file, chain_file


@asynccontextmanager
async def https_server(certificates: tuple[Path, Path], behaviour: Behaviour) -> AsyncIterator[HttpsServer]:
    """Listens while the block runs; `behaviour` may be replaced at any time."""
    ca_file, chain_file = certificates
    running: HttpsServer
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        running.connections += 1
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            running.heads.append((await reader.readuntil(b"\r\n\r\n")).decode("ascii"))
            await running.behaviour(writer)
            writer.close()
            await writer.wait_closed()
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            writer.transport.abort()
        finally:
            tasks.discard(task)

    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(chain_file)
    tls.sni_callback = lambda _, name, __: running.names.append(name)
    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    running = HttpsServer(server.sockets[0].getsockname()[1], ca_file, behaviour)
    async with server:
        try:
            yield running
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
