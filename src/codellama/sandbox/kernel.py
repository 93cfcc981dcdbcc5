"""The system calls of Linux that isolation is made of, through ctypes: no external program.

Everything raises OSError with the name of the call. It deliberately knows nothing of jails or runs;
which calls a program may make itself is in seccomp.py.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import signal
import struct

# PyDLL keeps the interpreter's lock: a process made by `clone` has no other thread to release it.
_libc = ctypes.PyDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long
_init_stack = ctypes.create_string_buffer(16384)

# include/uapi/linux/sched.h
NEW_NS, NEW_CGROUP, NEW_UTS, NEW_IPC = 0x20000, 0x02000000, 0x04000000, 0x08000000
NEW_USER, NEW_PID, NEW_NET, _CLONE_VM = 0x10000000, 0x20000000, 0x40000000, 0x100
# include/uapi/linux/mount.h
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MNT_DETACH = 2
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV, ATTR_NOEXEC = 1, 2, 4, 8
# include/uapi/linux/prctl.h
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 4, 24, 38
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
_CAPABILITY_VERSION_3 = 0x20080522
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_SECCOMP_SET_MODE_FILTER = 1

_NUMBERS = {  # pivot_root, seccomp; mount_setattr is the same everywhere
    "x86_64": (155, 317),
    "aarch64": (41, 277),
}
_MOUNT_SETATTR = 442  # Linux 5.12


def is_supported() -> bool:
    """Whether this is a Linux and a processor that the numbers above are known for."""
    return platform.system() == "Linux" and platform.machine() in _NUMBERS


def _checked(name: str, result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def unshare(flags: int) -> None:
    """Give this process namespaces of its own (NEW_PID: its next children)."""
    _checked("unshare", _libc.unshare(flags))


def start_init() -> int:
    """Start a process that only waits to be killed, to be the first of a pid namespace.

    It runs nothing but the C library's `pause`, on a stack of its own in this process's memory:
    copying that memory would cost more than all else. A process has at most one at a time.
    """
    pause = ctypes.cast(_libc.pause, ctypes.c_void_p)
    top = ctypes.c_void_p(ctypes.addressof(_init_stack) + len(_init_stack) & -16)
    return _checked("clone", _libc.clone(pause, top, _CLONE_VM | signal.SIGCHLD, None))


def join(descriptor: int, namespace: int) -> None:
    """Enter a namespace that a descriptor stands for (NEW_PID: this process's next children)."""
    _checked("setns", _libc.setns(descriptor, namespace))


def mount(source: str, target: str, kind: str = "", flags: int = 0, options: str = "") -> None:
    """mount(2)."""
    arguments = [os.fsencode(text) for text in (source, target, kind)]
    result = _libc.mount(*arguments, ctypes.c_ulong(flags), os.fsencode(options) or None)
    _checked(f"mount {kind or source} on {target}", result)


def restrict_mount(target: str, attributes: int, recursive: bool = True) -> None:
    """Add attributes such as ATTR_RDONLY to a mount and, by default, to those below it."""
    attr = struct.pack("QQQQ", attributes, 0, 0, 0)
    flags = _AT_RECURSIVE if recursive else 0
    size = ctypes.c_size_t(len(attr))
    result = _syscall(_MOUNT_SETATTR, _AT_FDCWD, os.fsencode(target), flags, attr, size)
    _checked(f"mount_setattr {target}", result)


def change_root(new_root: str) -> None:
    """Make a mount the root of the file system and detach the old root, so that it is gone."""
    os.chdir(new_root)
    _checked("pivot_root", _syscall(_NUMBERS[platform.machine()][0], b".", b"."))
    _checked("umount", _libc.umount2(b".", MNT_DETACH))
    os.chdir("/")


def _prctl(option: int, *arguments: int) -> int:
    values = [ctypes.c_ulong(value) for value in (*arguments, 0, 0, 0, 0)[:4]]
    return _libc.prctl(option, *values)


def die_with_parent() -> None:
    """SIGKILL for this process when the process that forked it ends."""
    _checked("prctl", _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL))


def set_dumpable(dumpable: bool) -> None:
    """Whether processes of the same user may look into this one."""
    _checked("prctl", _prctl(_PR_SET_DUMPABLE, int(dumpable)))


def forbid_new_privileges() -> None:
    """No program that is started from here gains rights; also what seccomp asks for."""
    _checked("prctl", _prctl(_PR_SET_NO_NEW_PRIVS, 1))


def drop_bounding_capabilities() -> None:
    """Nothing started from here can ever have a capability."""
    for capability in range(64):
        if _prctl(_PR_CAPBSET_DROP, capability) < 0:  # above the last one that this kernel knows
            break
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)


def drop_capabilities() -> None:
    """Give up all capabilities of this process."""
    header = struct.pack("Ii", _CAPABILITY_VERSION_3, 0)
    _checked("capset", _libc.capset(header, bytes(24)))


def install_filter(program: bytes) -> None:
    """Put a seccomp filter (packed BPF instructions of 8 bytes) in force for good."""
    buffer = ctypes.create_string_buffer(program, len(program))
    fprog = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    _checked(
        "seccomp", _syscall(_NUMBERS[platform.machine()][1], _SECCOMP_SET_MODE_FILTER, 0, fprog)
    )


def explain(error: OSError) -> str:
    """What to do about a namespace call that failed."""
    if error.errno in (errno.ENOSPC, errno.EUSERS):
        return "raise the limit: sysctl -w user.max_user_namespaces=15000"
    if error.errno in (errno.EPERM, errno.EACCES):
        return (
            "allow unprivileged user namespaces: in Docker run with --security-opt "
            "seccomp=unconfined --security-opt apparmor=unconfined, on Ubuntu "
            "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0, on older Debian "
            "sysctl -w kernel.unprivileged_userns_clone=1"
        )
    if error.errno in (errno.EINVAL, errno.ENOSYS):
        return "use Linux 5.12 or newer with namespaces and seccomp (CONFIG_USER_NS, not a chroot)"
    return "see docs/sandbox.md"
