"""What became of a program, and what it was allowed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["passed", "failed", "timeout", "memory", "output", "crashed", "refused", "error"]


@dataclass(frozen=True)
class Limits:
    """What a program may use; sizes are bytes, durations seconds."""

    timeout_s: float = 5.0
    """Wall time, all of it; for a judged candidate that of all checks together."""
    cpu_s: float | None = None
    """Processor time; None means `timeout_s`. A verdict that must not depend on how busy the
    machine is sets this to the limit and `timeout_s` to several times as much."""
    memory_bytes: int = 512 << 20
    """What the program may allocate; for a tree of processes, all together."""
    disk_bytes: int = 64 << 20
    """The private file system below /tmp."""
    n_files: int = 1024
    """Files and folders there."""
    file_bytes: int = 16 << 20
    """One file."""
    output_bytes: int = 1 << 20
    """Standard output, and as much again of standard error."""
    n_processes: int = 64
    """Threads; for other languages than Python processes and threads."""
    n_open_files: int = 64
    compile_timeout_s: float = 30.0
    """Processor time of the compiler; its wall time may be four times that."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} = {value!r}: a number above 0 is accepted")


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `error` means that the sandbox failed: it says nothing of the program."""

    status: Status
    """passed: exit status 0, or every check held · failed: another exit status, an exception or a
    check that did not hold · timeout, memory, output: that limit was met · crashed: ended by a
    signal · refused: not run at all, `message` says why · error: the sandbox itself failed."""
    stdout: str = ""
    stderr: str = ""
    exit_code: int | None = None
    """Exit status; negative is the signal that ended it; None where it was stopped from outside."""
    message: str = ""
    """One line on why it did not pass."""
    stdout_truncated: bool = False
    stderr_truncated: bool = False
    cpu_s: float = 0.0
    wall_s: float = 0.0
    max_rss_bytes: int = 0
    mode: str = "namespaces"
    """The isolation it ran in: `namespaces`, or `none`."""
    in_process: bool = False
    """The tests ran inside the candidate's process, which could have forged the result."""
    used_objects: bool = False
    """Methods of the candidate's own objects took part in the checks."""
    n_calls: int = 0
    """Calls that the tests made into the candidate; 0 means they do not test it at all."""
    n_retries: int = 0
    """Runs before this one that ended in `error`."""

    @property
    def passed(self) -> bool:
        """Whether the status is `passed`."""
        return self.status == "passed"

    def as_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return asdict(self)
