"""The filters, run by an interpreter of BPF, for both processors."""

import errno
import platform
import struct

import pytest

from codellama.sandbox import seccomp

ALLOW, KILL, EPERM = 0x7FFF0000, 0x80000000, 0x00050000 | errno.EPERM
ENOSYS = 0x00050000 | errno.ENOSYS
ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# Numbers from the kernel's headers, written down again.
CALLS = {
    "x86_64": {"read": 0, "mmap": 9, "futex": 202, "execve": 59, "fork": 57, "clone": 56,
               "socket": 41, "connect": 42, "ptrace": 101, "unshare": 272, "mount": 165,
               "memfd_create": 319, "keyctl": 250, "io_uring_setup": 425, "bpf": 321, "setns": 308,
               "shmget": 29, "mq_open": 240, "flock": 73, "prlimit64": 302, "socketpair": 53,
               "ioctl": 16, "fcntl": 72, "prctl": 157, "clone3": 435, "pivot_root": 155},
    "aarch64": {"read": 63, "mmap": 222, "futex": 98, "execve": 221, "clone": 220, "socket": 198,
                "connect": 203, "ptrace": 117, "unshare": 97, "mount": 40, "memfd_create": 279,
                "keyctl": 219, "io_uring_setup": 425, "bpf": 280, "setns": 268, "shmget": 194,
                "mq_open": 180, "flock": 32, "prlimit64": 261, "socketpair": 199, "ioctl": 29,
                "fcntl": 25, "prctl": 167, "clone3": 435, "pivot_root": 41},
}  # fmt: skip
NEVER = ["socket", "connect", "ptrace", "unshare", "mount", "memfd_create", "keyctl", "bpf",
         "io_uring_setup", "setns", "shmget", "mq_open", "flock", "pivot_root"]  # fmt: skip


def decide(program, number, *arguments, arch):
    data = struct.pack("<IIQ6Q", number, arch, 0, *(arguments + (0,) * 6)[:6])
    at = accumulator = 0
    while True:
        operation, true, false, value = struct.unpack_from("HBBI", program, 8 * at)
        at += 1
        if operation == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, value)
        elif operation == 0x06:
            return value
        else:
            test = {0x15: accumulator == value, 0x35: accumulator >= value,
                    0x45: bool(accumulator & value)}[operation]  # fmt: skip
            at += true if test else false


@pytest.mark.parametrize("machine", ARCH)
@pytest.mark.parametrize("may_start", [False, True])
def test_filter(machine, may_start, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    program = seccomp.filter_program(may_start)
    calls, arch = CALLS[machine], ARCH[machine]

    def of(name, *arguments):
        return decide(program, calls[name], *arguments, arch=arch)

    assert {of(name) for name in ("read", "mmap", "futex")} == {ALLOW}
    assert {of(name) for name in NEVER} == {EPERM}
    assert of("execve") == (ALLOW if may_start else EPERM)
    assert of("clone", 0x11) == (ALLOW if may_start else EPERM)  # a process
    assert of("clone", 0x3D0F00) == ALLOW  # a thread, as the C library makes it
    for namespace in (0x20000, 0x10000000, 0x20000000, 0x40000000, 0x80):
        assert of("clone", 0x3D0F00 | namespace) == EPERM
    assert of("clone3") == ENOSYS
    assert (of("prlimit64", 0), of("prlimit64", 1)) == (ALLOW, EPERM)
    assert (of("socketpair", 1), of("socketpair", 2)) == (ALLOW, EPERM)
    assert (of("ioctl", 0, 0x5401), of("ioctl", 0, 0x5412)) == (ALLOW, EPERM)
    assert (of("fcntl", 0, 3), of("fcntl", 0, 1031), of("fcntl", 0, 6)) == (ALLOW, EPERM, EPERM)
    assert (of("prctl", 15), of("prctl", 22)) == (ALLOW, EPERM)
    assert decide(program, 0, arch=0x40000003) == KILL  # i386
    assert {decide(program, n, arch=arch) for n in (460, 1000, 0x3FFFFFFF)} == {EPERM}
    if machine == "x86_64":
        assert decide(program, 0x40000000, arch=arch) == KILL  # x32
        assert decide(program, calls["fork"], arch=arch) == (ALLOW if may_start else EPERM)


@pytest.mark.parametrize("machine", ARCH)
def test_every_number_of_the_table(machine, monkeypatch):
    """The search tree gives for each number what the table says."""
    monkeypatch.setattr(platform, "machine", lambda: machine)
    program = seccomp.filter_program(False)
    column = 1 if machine == "x86_64" else 2
    allowed = set(seccomp._numbers(seccomp._ALWAYS, column).values())
    special = set(seccomp._numbers(seccomp._BY_ARGUMENT, column).values())
    for number in set(range(500)) - special:
        wanted = ALLOW if number in allowed else EPERM
        assert decide(program, number, arch=ARCH[machine]) == wanted, number
