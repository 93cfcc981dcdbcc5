"""The jail that a zygote lives in: namespaces of its own and a file system of just what is needed.

`enter` turns a plain process into one whose next child is the first process of a world without
network, host files, host processes or rights. Folders of the interpreter and its libraries (for
other languages: of the toolchains) are mounted read-only at the paths they have on the host; the
rest of the tree does not exist. What happens inside is in zygote.py.
"""

from __future__ import annotations

import contextlib
import os
import re
import sysconfig

from codellama.sandbox import kernel

NOBODY = 65534  # the user that root becomes; root ignores RLIMIT_NPROC even in a namespace
INSIDE = 1000  # user and group as a program sees them
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_STREAM_LINKS = {"fd": "", "stdin": "/0", "stdout": "/1", "stderr": "/2"}
_SYSTEM_LINKS = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")  # merged into /usr
_NAMESPACES = (
    kernel.NEW_USER | kernel.NEW_NS | kernel.NEW_PID | kernel.NEW_NET
    | kernel.NEW_IPC | kernel.NEW_UTS | kernel.NEW_CGROUP
)  # fmt: skip


def python_view() -> list[str]:
    """What a Python program needs: the standard library and the folders of shared libraries."""
    paths = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
    with open("/proc/self/maps", encoding="utf-8") as maps:
        mapped = {line.split(maxsplit=5)[5].strip() for line in maps if line.count("/")}
    paths |= {os.path.dirname(path) for path in mapped if re.search(r"\.so(\.|$)", path)}
    return _outermost({*paths, "/etc/ld.so.cache"})


def toolchain_view(programs: list[str]) -> list[str]:
    """What compilers and interpreters need: the system's programs, and folders of others."""
    paths = {"/usr", *_SYSTEM_LINKS, "/etc/alternatives", "/etc/ld.so.cache", "/etc/ld.so.conf"}
    paths |= {
        f"/etc/{name}" for name in os.listdir("/etc") if re.match(r"java|mono|ssl$|php", name)
    }
    for program in programs:
        folder = os.path.dirname(os.path.dirname(os.path.realpath(program)))
        if folder not in ("/", "/usr") and not folder.startswith("/usr/"):
            paths.add(folder)
    # The kernel lets a run mount its own /proc only where a whole one is already in sight; the run
    # covers this one before it starts a program.
    return _outermost({*paths, "/proc"})


def _outermost(paths: set[str]) -> list[str]:
    """Those that exist and are not inside another one."""
    return [
        path
        for path in sorted(paths)
        if os.path.exists(path) and not any(path.startswith(f"{p}/") for p in paths)
    ]


def enter(view: list[str]) -> int:
    """Leave the host: the next child of this process is the first one inside.

    Returns a descriptor of the mount namespace, to come back to it.

    Raises:
        OSError: a step failed; its text names the call.
    """
    proc = os.open("/proc/self", os.O_PATH | os.O_DIRECTORY)
    mounted = False
    if os.geteuid() == 0:
        # Mount as root, which can reach an interpreter in a folder that nobody else may enter. A
        # container's root without CAP_SYS_ADMIN is like any user.
        with contextlib.suppress(PermissionError):
            kernel.unshare(kernel.NEW_NS)
            _build_root(view)
            mounted = True
        _become_nobody()
    user, group = os.geteuid(), os.getegid()  # in the new namespace they have no number yet
    kernel.unshare(_NAMESPACES)
    _map_user(proc, user, group)
    if not mounted:
        _build_root(view)
    home = os.open("ns/mnt", os.O_RDONLY, dir_fd=proc)
    os.close(proc)
    return home


def _become_nobody() -> None:
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    kernel.set_dumpable(True)  # else /proc/self belongs to root and the maps cannot be written


def _map_user(proc: int, user: int, group: int) -> None:
    """Be one ordinary user inside; all other users of the host have no name there."""
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{INSIDE} {user} 1"),
        ("gid_map", f"{INSIDE} {group} 1"),
    ):
        descriptor = os.open(name, os.O_WRONLY, dir_fd=proc)
        try:
            os.write(descriptor, text.encode())
        finally:
            os.close(descriptor)


def _build_root(view: list[str]) -> None:
    """Make a small read-only tree with the view mounted in it, and make it the root."""
    kernel.mount("none", "/", flags=kernel.MS_REC | kernel.MS_PRIVATE)
    # Opened before the new tree covers /tmp, where an interpreter may live as well.
    sources = {path: os.open(path, os.O_PATH) for path in [*view, *_DEVICES] if _is_real(path)}
    links = {path: os.readlink(path) for path in view if os.path.islink(path)}
    root = next(path for path in ("/tmp", "/mnt", "/var") if os.path.isdir(path))
    flags = kernel.MS_NOSUID | kernel.MS_NODEV
    kernel.mount("tmpfs", root, "tmpfs", flags, "size=256k,nr_inodes=512,mode=755")
    for path, descriptor in sources.items():
        target = root + path
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            os.makedirs(target, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
        attributes = kernel.ATTR_RDONLY | kernel.ATTR_NOSUID
        if path not in _DEVICES:
            attributes |= kernel.ATTR_NODEV
        flags = kernel.MS_BIND | kernel.MS_REC
        kernel.mount(f"/proc/self/fd/{descriptor}", target, flags=flags)
        kernel.restrict_mount(target, attributes)
        os.close(descriptor)
    for path, target in links.items():
        os.symlink(target, root + path)
    for path in _SYSTEM_LINKS:  # the loader looks below /lib64 whatever the real folder is
        if os.path.islink(path) and path not in links:
            os.symlink(os.readlink(path), root + path)
    if "/proc" in view:
        for name, target in _STREAM_LINKS.items():
            os.symlink(f"/proc/self/fd{target}", f"{root}/dev/{name}")
    os.makedirs(f"{root}/tmp", exist_ok=True)
    kernel.restrict_mount(root, kernel.ATTR_RDONLY, recursive=False)
    kernel.change_root(root)


def _is_real(path: str) -> bool:
    return os.path.exists(path) and not os.path.islink(path)


def mount_own_proc() -> None:
    """Cover /proc with one of this process's own namespace, processes only; or with nothing."""
    # Read-only like the one in sight: the kernel grants no more than that shows.
    flags = kernel.MS_RDONLY | kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
    try:
        kernel.mount("proc", "/proc", "proc", flags, "subset=pid")
    except PermissionError:  # a container that masks parts of /proc
        kernel.mount("tmpfs", "/proc", "tmpfs", flags, "size=4k,nr_inodes=2,mode=555")
