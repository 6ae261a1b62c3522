"""A server in a process of its own on loopback: started, watched, stopped, killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

START_S = 3600.0  # to import, load and perhaps compile the model, on a machine that others use, too
STOP_S = 60.0  # more than a server takes to drain


@dataclass
class ServerProcess:
    """A server that answers `GET /health` and takes `--host` and `--port`; a restarted one has the same port.

    Attributes:
        command: that starts it, without host and port.
        log: file that both its outputs are appended to.
        environment: in addition to this process's own.
        port: 0: any that is free when it is first started.
    """

    command: Sequence[str]
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    port: int = 0
    _process: subprocess.Popen[bytes] | None = None

    @classmethod
    def of_tenure(cls, flags: Sequence[str], log: Path, module: str = "tenure") -> ServerProcess:
        """`tenure serve` with these flags.

        Args:
            module: that takes the command line of `tenure`.
        """
        return cls([sys.executable, "-m", module, "serve", *flags], log)

    @property
    def url(self) -> str:
        """With the version, as clients want it."""
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def root(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Starts the process and waits until it answers.

        Raises:
            RuntimeError: it has ended, or does not answer in time; with the end of its log.
        """
        if self.alive:
            raise RuntimeError("got a start of a server that runs; accepted: one that has ended")
        self.port = self.port or _free_port()
        address = ["--host", "127.0.0.1", "--port", str(self.port)]
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                [*self.command, *address],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment},
                start_new_session=True,  # a group, which is killed with the processes that the server has started
            )
        end = time.monotonic() + START_S
        while not self._answers():
            if not self.alive or time.monotonic() > end:
                self.kill()
                raise RuntimeError(f"the server does not start: {self.log_text()[-2000:]}")
            time.sleep(0.05)

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.root}/health", timeout=5, trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    def kill(self) -> None:
        """`kill -9`, also of the processes that the server has started."""
        if self._process is not None and self._process.returncode is None:  # else its number may be another's
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def stop(self) -> int:
        """SIGTERM; returns the exit code.

        Raises:
            subprocess.TimeoutExpired: it has not ended in time, and is killed.
        """
        assert self._process is not None, "it was started"
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def resident_bytes(self) -> int:
        """Resident memory of the process (Linux)."""
        assert self._process is not None, "it was started"
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmRSS"))

    def cpu_seconds(self) -> float:
        """CPU time of all threads of the process so far (Linux)."""
        assert self._process is not None, "it was started"
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def log_text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
