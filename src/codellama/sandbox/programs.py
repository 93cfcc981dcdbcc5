"""What a run's process does once its limits are in force: become a Python program, or another one.

A Python program runs in the process that the zygote made for it, as `python main.py` would: module
`__main__`, tracebacks, exit status, threads and atexit functions. Nothing here is a defence: the
program may change all of it, and hurts only itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

SOURCE, LINK, VERDICT = 3, 4, 5  # descriptors; 0, 1, 2 are the standard streams

# What short programs import most: once in the zygote instead of in each run.
_PRELOADED = (
    "atexit bisect collections copy datetime decimal fractions functools heapq itertools json math "
    "operator random re string threading traceback types typing unittest"
)
own_size_bytes = 0
"""Address space of the interpreter itself, which a program's limit comes on top of."""


def preload(packages: list[str]) -> None:
    """Import what runs share, and note how much address space the interpreter takes."""
    global own_size_bytes
    sys.path += packages
    for name in (*_PRELOADED.split(), "codellama.sandbox.candidate", "codellama.sandbox.judging"):
        import_module(name)
    with open("/proc/self/statm", encoding="ascii") as file:
        own_size_bytes = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE") + (16 << 20)


def start(step: dict[str, Any]) -> int:
    """Run one step of a request and return its exit status; a program file never returns."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # a file that grows too large ends the program
    if "argv" in step:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.execve(step["argv"][0], step["argv"], step["environment"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.modules["random"].seed(0)  # the same samples get the same verdicts
    if step["kind"] == "candidate":
        return import_module("codellama.sandbox.candidate").serve(read_source())
    if step["kind"] == "tests":
        return import_module("codellama.sandbox.judging").give_verdict(read_source())
    return _run_main(read_source())


def read_source() -> bytes:
    """The text that came with the request; its descriptor is closed."""
    size = os.fstat(SOURCE).st_size
    text = os.pread(SOURCE, size, 0)
    os.close(SOURCE)
    return text


def link_socket() -> socket.socket:
    """The line to the other jail; naming what it is spares getsockopt, which is shut."""
    return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fileno=LINK)


def set_up_streams() -> None:
    """Standard streams as programs find them, made once: a run puts its files below them."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        mode, buffering = "w" if number else "r", 1 if number == 2 else -1
        stream = os.fdopen(number, mode, buffering, "utf-8", "backslashreplace", closefd=False)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _run_main(source: bytes) -> int:
    Path("main.py").write_bytes(source)  # so that tracebacks show the lines
    main = ModuleType("__main__")
    main.__dict__["__file__"] = "main.py"
    sys.modules["__main__"] = main
    sys.argv[:] = ["main.py"]
    return finish(run_code(source, "main.py", main) or 0)


def run_code(source: bytes | str, name: str, module: ModuleType) -> int | None:
    """Execute source in a module; None when it got to its end.

    Otherwise what it raised is printed, and the exit status that this stands for is returned.
    """
    try:
        exec(compile(source, name, "exec"), module.__dict__)
        return None
    except SystemExit as end:
        return exit_status(end)
    except MemoryError:
        os.write(2, b"MemoryError\n")  # there may be no memory for a traceback
        return 1
    except BaseException as error:  # noqa: BLE001
        report(error)
        return 1


def exit_status(end: SystemExit) -> int:
    """What the interpreter makes of sys.exit(...)."""
    if end.code is None:
        return 0
    if isinstance(end.code, int):
        return end.code & 0xFF
    print(end.code, file=sys.stderr)
    return 1


def report(error: BaseException) -> None:
    """Print a traceback without the frames of the sandbox."""
    frames: TracebackType | None = error.__traceback__
    while frames and frames.tb_frame.f_code.co_filename.startswith(_HERE):
        frames = frames.tb_next
    sys.excepthook(type(error), error.with_traceback(frames), frames)


def finish(code: int) -> int:
    """What the interpreter does at its end: wait for threads, call atexit functions, flush."""
    try:
        sys.modules["threading"]._shutdown()
        sys.modules["atexit"]._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    except BaseException as error:  # noqa: BLE001
        with contextlib.suppress(BaseException):
            report(error)
        return 120 if code == 0 else code
    return code


_HERE = os.path.dirname(__file__)
