"""The host's end of a zygote: start it, send it runs, wait for its answers, kill it.

What a run means is in worker.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from codellama.sandbox import kernel
from codellama.sandbox.languages import installed_programs

_START_S = 20.0  # of a zygote, on a busy machine; 0.1 s on an idle one
_GRACE_S = 2.5  # behind the clock of the zygote
_WATCH_S = 0.03  # between two looks at the memory of a tree of processes
_BOOT = """
import json, socket, sys
sys.path.insert(0, sys.argv[1])
from codellama.sandbox.zygote import main
control = socket.socket(fileno=int(sys.argv[2]))
main(control, json.loads(control.recv(1 << 16)))
"""


class NoIsolationError(RuntimeError):
    """This machine offers no isolation; the text says what is missing and the remedy."""


class BrokenError(Exception):
    """The zygote is gone or does not answer."""


class Zygote:
    """One jailed process that makes runs; used by one thread at a time."""

    def __init__(self, kind: str, mode: str, packages: tuple[str, ...], scratch: str) -> None:
        self._n_runs = 0
        settings = {"kind": kind, "mode": mode, "packages": packages, "programs": []}
        if kind == "toolchain":
            settings["programs"] = installed_programs()
        if not kernel.is_supported():
            raise NoIsolationError(
                "isolation needs Linux on x86_64 or aarch64; run inside a Linux container or "
                "virtual machine (Docker, Lima, WSL 2)"
            )
        self._control, inside = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # Bound now, in the zygote, what each run would look up again in a copy of its own.
        environment = {"LD_BIND_NOW": "1", "PYTHONHASHSEED": "0", "LANG": "C.UTF-8", "HOME": "/tmp"}
        if "LD_LIBRARY_PATH" in os.environ:  # an interpreter that does not start without it
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        python = getattr(sys, "_base_executable", None) or sys.executable
        package_root = str(Path(__file__).parents[2])
        self._log = os.memfd_create("log")
        with inside:
            self.process = subprocess.Popen(
                [python, "-sSPB", "-X", "utf8", "-c", _BOOT, package_root, str(inside.fileno())],
                pass_fds=[inside.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._log,
                cwd=scratch,
                env=environment,
                start_new_session=True,
            )
        try:
            self._control.sendall(json.dumps(settings).encode())
            answer = self._receive(_START_S)
        except (BrokenError, OSError) as error:
            reason = os.pread(self._log, 4096, 0).decode(errors="replace").strip()
            self.close()
            last_line = reason.splitlines()[-1] if reason else str(error)
            raise NoIsolationError(f"the sandbox does not start: {last_line}") from None
        if "refused" in answer:
            self.close()
            remedy = kernel.explain(OSError(answer["errno"], ""))
            raise NoIsolationError(f"no isolation here: {answer['refused']}; {remedy}")

    def begin(self, request: dict[str, Any], descriptors: list[int]) -> None:
        """Send a run; `finish` waits for it."""
        self._n_runs += 1
        message = json.dumps({"run": self._n_runs, **request}).encode()
        try:
            socket.send_fds(self._control, [message], descriptors)
        except OSError as error:
            raise BrokenError(str(error)) from None

    def stop(self) -> None:
        """End the current run; its answer still comes. One that has ended is not touched."""
        with contextlib.suppress(OSError):
            self._control.sendall(json.dumps({"kill": self._n_runs}).encode())

    def finish(self, timeout_s: float, memory_bytes: int | None = None) -> dict[str, Any]:
        """The answer to the current run; `memory_bytes` bounds its processes together.

        Raises:
            BrokenError: none came in time.
        """
        end = time.monotonic() + timeout_s + _GRACE_S
        too_much = False
        while True:
            left_s = end - time.monotonic()
            try:
                answer = self._receive(left_s if memory_bytes is None else min(left_s, _WATCH_S))
            except TimeoutError:
                if time.monotonic() > end:
                    raise BrokenError("the sandbox does not answer") from None
                if memory_bytes and not too_much and tree_bytes(self.process.pid) > memory_bytes:
                    too_much = True
                    self.stop()
                continue
            if answer.get("run") == self._n_runs:
                return {**answer, "too_much_memory": too_much}

    def _receive(self, timeout_s: float) -> dict[str, Any]:
        self._control.settimeout(max(timeout_s, 0.001))
        try:
            message = self._control.recv(1 << 16)
        except TimeoutError:
            raise
        except OSError as error:
            raise BrokenError(str(error)) from None
        finally:
            self._control.settimeout(None)
        if not message:
            raise BrokenError("the sandbox's process has ended")
        return json.loads(message)

    def close(self) -> None:
        """Kill the jail and all in it."""
        self._control.close()
        with contextlib.suppress(OSError):
            os.close(self._log)
        self._log = -1
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGKILL)  # the zygote dies with it, and all with that
        self.process.wait()


def tree_bytes(pid: int) -> int:
    """Private memory of a process and all its descendants; unreadable ones count nothing."""
    total = 0
    page = os.sysconf("SC_PAGE_SIZE")
    pids = [pid]
    while pids:
        pid = pids.pop()
        with contextlib.suppress(OSError, ValueError):
            statm = Path(f"/proc/{pid}/statm").read_text().split()
            total += (int(statm[1]) - int(statm[2])) * page
            pids += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return total
