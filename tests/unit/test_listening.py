"""The sockets: both or none, and as many files as the process may open."""

import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from service import listening
from service.listening import CannotListen, LateSockets, listen, open_files
from service.settings import OpsSettings, Settings
from tests.conftest import ROOT


def settings(tmp_path: Path, **more: object) -> Settings:
    return Settings.load(None, {"server.port": 0, "server.state_dir": tmp_path, "ops.bind": "127.0.0.1:0", **more})


def test_a_port_that_another_listens_on_is_refused(tmp_path: Path) -> None:
    first = listen(settings(tmp_path))
    port = first.public.getsockname()[1]
    with pytest.raises(CannotListen, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
        listen(settings(tmp_path, **{"server.port": port}))
    first.close()


def test_what_cannot_listen_for_operators_does_not_listen_at_all(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other, socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
        free.close()
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(CannotListen, match=f"cannot listen on {taken}"):
            listen(settings(tmp_path, **{"server.port": port, "ops.bind": taken}))
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


def test_without_a_second_address_there_is_one_socket(tmp_path: Path) -> None:
    sockets = listen(settings(tmp_path, **{"ops.bind": ""}))
    assert sockets.ops is None
    sockets.close()
    sockets.close()


def test_a_name_that_is_nobodys_is_told(tmp_path: Path) -> None:
    with pytest.raises(CannotListen, match=r"^cannot listen on nobody\.invalid:8001: "):
        listen(settings(tmp_path).model_copy(update={"ops": OpsSettings(bind="nobody.invalid:8001")}))


@pytest.mark.parametrize(
    ("soft", "hard", "wanted", "granted"),
    [(100, 200, 150, 150), (100, 120, 150, 120), (200, 200, 150, 150), (150, 150, 150, 150)],
)
def test_the_limit_of_open_files_is_raised_as_far_as_it_may_be(soft: int, hard: int, wanted: int, granted: int) -> None:
    program = (
        f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard})); "
        f"from service.listening import open_files; print(open_files({wanted}), "
        "resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    said = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said == f"{granted} {(max(soft, granted), hard)}\n"


INFINITE = -1


@pytest.mark.parametrize(
    ("limits", "kernel", "granted"),
    [
        ((INFINITE, INFINITE), INFINITE, 4096),
        ((256, INFINITE), INFINITE, 4096),
        ((256, INFINITE), 1024, 256),  # a Mac whose kernel allows fewer refuses the whole change
    ],
)
def test_a_limit_may_be_infinite_and_the_kernel_may_refuse(
    monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int], kernel: int, granted: int
) -> None:
    now = [limits]

    def change(_: int, wanted: tuple[int, int]) -> None:
        if kernel != INFINITE and wanted[0] > kernel:
            raise ValueError("not allowed")
        now[0] = wanted

    fake = SimpleNamespace(RLIMIT_NOFILE=7, RLIM_INFINITY=INFINITE, getrlimit=lambda _: now[0], setrlimit=change)
    monkeypatch.setattr(listening, "resource", fake)
    assert open_files(4096) == granted


def test_what_is_taken_is_had_as_soon_as_it_is_free_and_what_is_had_stays(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as public, socket.create_server(("127.0.0.1", 0)) as ops:
        ports = public.getsockname()[1], ops.getsockname()[1]
        late = LateSockets(settings(tmp_path, **{"server.port": ports[0], "ops.bind": f"127.0.0.1:{ports[1]}"}))
        assert (late.public, late.ops) == (None, None)
        taken = "; ".join(f"cannot listen on 127.0.0.1:{port}: Address already in use" for port in sorted(ports))
        assert late.missing() == taken
        ops.close()
        assert late.missing() == f"cannot listen on 127.0.0.1:{ports[0]}: Address already in use"
        had = late.ops
        assert had is not None
    assert late.missing() == ""
    assert late.ops is had
    assert late.public is not None
    with socket.create_connection(late.public.getsockname()):
        late.close()
    assert late.missing() == "", "nothing is wanted any more"
    assert late.public.fileno() == -1
    late.close()


def test_without_a_second_address_nothing_of_it_is_missing(tmp_path: Path) -> None:
    late = LateSockets(settings(tmp_path, **{"ops.bind": ""}))
    assert (late.missing(), late.ops) == ("", None)
    late.close()
