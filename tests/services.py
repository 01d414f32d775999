"""Real servers on loopback for the tests marked `services`: PostgreSQL, and moto's S3 behind a small relay.

They are started and stopped by the tests, so that a test can take them away in the middle of a run.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

WAIT_S = 120


def postgres_programs() -> Path | None:
    """The folder with `initdb` and `pg_ctl`; Debian keeps it out of the path."""
    found = shutil.which("pg_ctl")
    if found:
        return Path(found).resolve().parent
    return max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(port: int) -> None:
    limit = time.monotonic() + WAIT_S
    while time.monotonic() < limit:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.1)
    raise TimeoutError(f"nothing listens on port {port}")


class Postgres:
    """A cluster of its own in a folder; root hands it to the user `postgres`, as PostgreSQL wants it."""

    def __init__(self, folder: Path) -> None:
        programs = postgres_programs()
        assert programs is not None
        self._programs, self._folder, self.port = programs, folder, free_port()
        self._as: list[str] = []
        folder.mkdir(parents=True)
        if os.geteuid() == 0:
            shutil.chown(folder, "postgres")
            self._as = ["runuser", "-u", "postgres", "--"]
        self._call("initdb", "-D", str(folder / "data"), "-U", "ann", "-A", "trust", "--no-sync")

    @property
    def url(self) -> str:
        return f"postgresql://ann@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -k {self._folder} -c fsync=off"
        self._call("pg_ctl", "-D", str(self._folder / "data"), "-w", "-l", str(self._folder / "log"),
                   "-o", options, "start")  # fmt: skip

    def stop(self) -> None:
        """As an administrator does it: connections are cut."""
        self._call("pg_ctl", "-D", str(self._folder / "data"), "-w", "-m", "fast", "stop")

    def _call(self, program: str, *words: str) -> None:
        command = [*self._as, str(self._programs / program), *words]
        subprocess.run(command, check=True, cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


class Relay:
    """Passes connections on to another port, or, while it is closed, refuses them."""

    def __init__(self, target: int) -> None:
        self.port, self._target = free_port(), target
        self._listener: socket.socket | None = None
        self._open: list[socket.socket] = []
        self._pumps: list[threading.Thread] = []

    def start(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=64)
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def stop(self) -> None:
        assert self._listener is not None
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for end in self._open:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for pump in self._pumps:
            pump.join(timeout=5)
        self._open.clear()
        self._pumps.clear()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
                self._open += [near, far]
                for a, b in ((near, far), (far, near)):
                    self._pumps.append(threading.Thread(target=_pump, args=(a, b), daemon=True))
                    self._pumps[-1].start()


def _pump(source: socket.socket, target: socket.socket) -> None:
    with source, suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


@contextmanager
def postgres(folder: Path) -> Iterator[Postgres]:
    server = Postgres(folder)
    server.start()
    try:
        yield server
    finally:
        with suppress(subprocess.CalledProcessError):
            server.stop()


@contextmanager
def s3() -> Iterator[Relay]:
    """An S3 server; the relay's port is its endpoint."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        relay = Relay(port)
        try:
            wait_for(port)
            relay.start()
            yield relay
        finally:
            with suppress(OSError, AssertionError):
                relay.stop()
            server.send_signal(signal.SIGKILL)
