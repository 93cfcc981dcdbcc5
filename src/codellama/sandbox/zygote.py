"""The process that waits inside a jail and makes one fresh process for each run.

Started by worker.py as a bare interpreter. It gets requests over a socket, each with a number, the
limits and open descriptors, but never sees code or tests: they are in the descriptors, and only the
process made for them reads them. So nothing of one run, and no expected value, is in memory that
another program can reach.

A run's first process, its init, has new pid and mount namespaces and ends with the program; the
kernel then kills whatever is left. docs/sandbox.md shows them all.
"""

from __future__ import annotations

import fcntl
import gc
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
from typing import Any, NoReturn

from codellama.sandbox import jail, kernel, programs, seccomp

_REPORT = struct.Struct("=iiiddq")  # step, how it ended, wait status, CPU s, wall s, peak bytes
_EXITED, _TIMED_OUT, _NOT_STARTED = 0, 1, 2
_ZYGOTE_GRACE_S = 1.0  # behind the init's own clock
# No ipc namespace: making and freeing one is slow, and no call that uses it is left open.
_RUN_NAMESPACES = kernel.NEW_PID | kernel.NEW_NS
_N_OWN_PROCESSES = 4  # supervisor, zygote, init, program
_SPARE = 4  # a virtual machine maps more than it uses; the host watches what is used
_SOURCE = 3  # the descriptor of the program's text


def main(control: socket.socket, settings: dict[str, Any]) -> None:
    """Enter the jail and serve requests until the host closes its end."""
    isolated = settings["mode"] != "none"
    starts_programs = settings["kind"] == "toolchain"
    os.environ.pop("PYTHONHASHSEED", None)
    # The first process of a namespace gets no signal from inside it but those that it handles.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    programs.preload(settings["packages"])
    try:
        if isolated:
            if starts_programs:
                view = jail.toolchain_view(settings["programs"])
            else:
                view = [*jail.python_view(), *settings["packages"]]
            jail.enter(view)
    except OSError as error:
        control.send(json.dumps({"refused": str(error.args[1]), "errno": error.errno}).encode())
        return
    pid = os.fork()
    if pid:
        control.close()
        os.waitpid(pid, 0)
        return
    kernel.die_with_parent()
    if isolated:
        kernel.set_dumpable(False)
        kernel.forbid_new_privileges()
        kernel.drop_bounding_capabilities()
        settings["filter"] = seccomp.filter_program(starts_programs)
        sys.path[:] = [path for path in sys.path if os.path.isdir(path)]
    programs.set_up_streams()
    gc.collect()
    gc.freeze()  # the collector of a run does not touch, and so copy, the zygote's pages
    control.send(b'{"ready": true}')
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1 << 16, 8)
        if not message:
            return
        request = json.loads(message)
        if "kill" in request:  # it came behind the end of its run
            continue
        reply = _run(control, request, descriptors, settings)
        control.send(json.dumps({"run": request["run"], **reply}).encode())


def _run(
    control: socket.socket,
    request: dict[str, Any],
    descriptors: list[int],
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Make the processes of a run, wait until all are gone, and say how it ended."""
    read_end, write_end = os.pipe()
    isolated = settings["mode"] != "none"
    pid = kernel.clone(_RUN_NAMESPACES if isolated else 0)
    if pid == 0:
        _be_init(request, descriptors, write_end, settings)
    for descriptor in (write_end, *descriptors):
        os.close(descriptor)
    end = time.monotonic() + sum(step["timeout_s"] for step in request["steps"]) + _ZYGOTE_GRACE_S
    killed = host_gone = False
    poller = select.poll()
    poller.register(read_end, select.POLLIN)
    poller.register(control, select.POLLIN)
    ready = False
    while not ready:
        events = dict(poller.poll(max(0.0, end - time.monotonic()) * 1000))
        if read_end in events or not events:
            ready = True
        else:
            message = control.recv(1 << 16)
            host_gone = not message
            killed = host_gone or json.loads(message).get("kill") == request["run"]
            ready = killed
    # An init that ended by itself is a zombie until wait4: the number is still its own.
    os.kill(pid, signal.SIGKILL) if isolated else _kill_group(pid)
    report = b"" if killed else os.read(read_end, _REPORT.size)
    os.close(read_end)
    _, _, usage = os.wait4(pid, 0)
    if host_gone:
        sys.exit(0)
    peak, cpu_s = usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime
    ended = _REPORT.unpack(report) if len(report) == _REPORT.size else None
    if ended is None or ended[1] == _NOT_STARTED:
        return {"killed": killed, "cpu_s": cpu_s, "peak_bytes": peak}
    step, how, status, cpu_s, wall_s, peak = ended
    return {
        "step": step,
        "timed_out": how == _TIMED_OUT,
        "exit_code": os.waitstatus_to_exitcode(status),
        "cpu_s": cpu_s,
        "wall_s": wall_s,
        "peak_bytes": peak,
    }


def _kill_group(pid: int) -> None:
    """Without namespaces: what stayed in the run's process group; a daemon escapes."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        os.kill(pid, signal.SIGKILL)


def _be_init(
    request: dict[str, Any], descriptors: list[int], report: int, settings: dict[str, Any]
) -> NoReturn:
    """The first process of a run: private /tmp, no rights, then the steps one after another."""
    try:
        if settings["mode"] == "none":
            os.setpgid(0, 0)
            os.mkdir(str(request["run"]))
            os.chdir(str(request["run"]))
        else:
            options = f"size={request['disk_bytes']},nr_inodes={request['n_files']},mode=700"
            flags = kernel.MS_NOSUID | kernel.MS_NODEV
            if settings["kind"] == "toolchain":
                jail.mount_own_proc()
            else:
                flags |= kernel.MS_NOEXEC
            kernel.mount("tmpfs", "/tmp", "tmpfs", flags, options)
            os.chdir("/tmp")
            kernel.drop_capabilities()
        if "file" in request:
            size = os.fstat(descriptors[_SOURCE]).st_size
            with open(request["file"], "wb") as file:
                file.write(os.pread(descriptors[_SOURCE], size, 0))
        wall_s = cpu_s = 0.0
        peak = how = status = index = 0
        for index, step in enumerate(request["steps"]):  # noqa: B007
            begin = time.monotonic()
            pid = os.fork()
            if pid == 0:
                _be_program(request, step, descriptors, report, settings)
            how, status, usage = _wait(pid, step["timeout_s"], step["cpu_s"])
            wall_s = time.monotonic() - begin
            cpu_s = usage.ru_utime + usage.ru_stime
            peak = usage.ru_maxrss * 1024
            if how or status:
                break
        os.write(report, _REPORT.pack(index, how, status, cpu_s, wall_s, peak))
    finally:
        os._exit(0)


def _wait(pid: int, timeout_s: float, cpu_limit_s: float) -> tuple[int, int, Any]:
    """Wait for the program, at most for the given wall time and processor time."""
    end = time.monotonic() + timeout_s
    clock = (~pid << 3) | 2  # the processor time of another process; linux/posix-timers.h
    ended = os.pidfd_open(pid)
    poller = select.poll()
    poller.register(ended, select.POLLIN)
    how, left_s = _EXITED, min(timeout_s, cpu_limit_s)
    # A process with one busy thread cannot meet its CPU limit sooner than the rest of it.
    while not poller.poll(max(left_s, 0.005) * 1000 + 1):
        try:
            cpu_left_s = cpu_limit_s - time.clock_gettime(clock)
        except OSError:  # it ended between the two lines
            continue
        left_s = min(end - time.monotonic(), cpu_left_s)
        if left_s <= 0:
            how = _TIMED_OUT
            os.kill(pid, signal.SIGKILL)
            break
    os.close(ended)
    _, status, usage = os.wait4(pid, 0)
    return how, status, usage


def _be_program(
    request: dict[str, Any],
    step: dict[str, Any],
    descriptors: list[int],
    report: int,
    settings: dict[str, Any],
) -> NoReturn:
    """Take the limits, shut the system calls, and become the program."""
    code = 1
    try:
        if "argv" in step:
            descriptors = descriptors[:_SOURCE]
        # Descriptors arrive at any number; above all targets first, so that none is overwritten.
        high = [fcntl.fcntl(each, fcntl.F_DUPFD, 64) for each in descriptors]
        report = fcntl.fcntl(report, fcntl.F_DUPFD_CLOEXEC, 64)
        for target, descriptor in enumerate(high):
            os.dup2(descriptor, target)
        if settings["mode"] != "none":
            os.setsid()
        os.closerange(len(high), report)
        os.closerange(report + 1, 1 << 16)
        _limit(request, step)
        if settings["mode"] != "none":
            kernel.install_filter(settings["filter"])
    except BaseException:  # noqa: BLE001 - the sandbox failed, not the program
        os.write(report, _REPORT.pack(0, _NOT_STARTED, 0, 0.0, 0.0, 0))
        os._exit(code)
    os.close(report)
    try:
        code = programs.start(step)
    finally:
        os._exit(code)


def _limit(request: dict[str, Any], step: dict[str, Any]) -> None:
    """rlimits; a limit above the host's own hard limit is lowered to it."""
    cpu_s = int(step["cpu_s"]) + 2  # whole seconds, behind the exact clock of the init
    limits = {
        resource.RLIMIT_CPU: cpu_s,
        resource.RLIMIT_FSIZE: max(request["output_bytes"] + 1, request["file_bytes"]),
        resource.RLIMIT_NOFILE: request["n_open_files"],
        resource.RLIMIT_NPROC: request["n_processes"] + _N_OWN_PROCESSES,
        resource.RLIMIT_STACK: 64 << 20,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    if step["address_space"]:
        with_interpreter = 0 if step.get("argv") else programs.own_size_bytes
        limits[resource.RLIMIT_AS] = request["memory_bytes"] + with_interpreter
    else:
        limits[resource.RLIMIT_DATA] = _SPARE * request["memory_bytes"]
    for name, value in limits.items():
        _, hard = resource.getrlimit(name)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (value, value))
