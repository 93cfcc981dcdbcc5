"""One attack per test. A program that gets through prints THROUGH; the host is checked as well."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

STATUSES = {"passed", "failed", "timeout", "memory", "output", "crashed"}

# name -> (program, statuses it may end with). Most catch their own errors and end well.
ATTACKS = {
    "endless loop": ("while True: pass", {"timeout"}),
    "endless loop in C": ("import itertools\nsum(itertools.repeat(1))", {"timeout"}),
    "endless regular expression": ("import re\nre.match('(a+)+$', 'a' * 40 + 'b')", {"timeout"}),
    "huge power": ("print(len(str(9 ** 9 ** 9)))", {"timeout", "memory", "failed"}),
    "sleep": ("import time\ntime.sleep(1000)", {"timeout"}),
    "wait for input": (
        "import threading\nthreading.Event().wait()",
        {"timeout"},
    ),
    "ignores signals": (
        "import signal\n"
        "for n in range(1, 65):\n"
        "    try: signal.signal(n, lambda *_: None)\n"
        "    except (OSError, ValueError): pass\n"
        "while True: pass",
        {"timeout"},
    ),
    "catches every exception": (
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        {"timeout"},
    ),
    "threads that never end": (
        "import threading, time\n"
        "def spin():\n    while True: time.sleep(0.01)\n"
        "for _ in range(4): threading.Thread(target=spin).start()",
        {"timeout"},
    ),
    "atexit that never ends": ("import atexit\natexit.register(lambda: exec('while 1: pass'))",
                               {"timeout"}),
    "fork bomb": (
        "import os\n"
        "while True:\n"
        "    try: os.fork()\n"
        "    except OSError: break\n"
        "    print('THROUGH')",
        {"passed"},
    ),
    "vfork by posix_spawn": (
        "import os\nos.posix_spawn('/bin/sh', ['sh', '-c', 'echo THROUGH'], {})\nprint('THROUGH')",
        {"failed"},
    ),
    "multiprocessing": (
        "import multiprocessing\n"
        "if __name__ == '__main__':\n"
        "    multiprocessing.Process(target=print, args=('THROUGH',)).start()",
        {"failed"},
    ),
    "thread bomb": (
        "import threading, time\n"
        "threading.stack_size(32768)\n"
        "n = 0\n"
        "try:\n"
        "    for n in range(5000):\n"
        "        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
        "except RuntimeError: pass\n"
        "if n > 100: print('THROUGH')",
        {"passed"},
    ),
    "exec": ("import os\nos.execv('/bin/sh', ['sh', '-c', 'echo THROUGH'])", {"failed"}),
    "subprocess": ("import subprocess\nsubprocess.run(['ls'])\nprint('THROUGH')", {"failed"}),
    "memory: bytearray": ("held = bytearray(10 << 30)\nprint('THROUGH')", {"memory"}),
    "memory: list": ("held = []\nwhile 1: held.append('x' * 9999 + str(len(held)))", {"memory"}),
    "memory: recursion": (
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return f([x]) + 1\nf(0)",
        {"memory", "crashed", "failed", "timeout"},
    ),
    "memory: private map": (
        "import mmap\nm = mmap.mmap(-1, 4 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n"
        "print('THROUGH')",
        {"memory", "failed"},
    ),
    "memory: shared map": (
        "import mmap\nm = mmap.mmap(-1, 4 << 30)\nprint('THROUGH')", {"memory", "failed"}
    ),
    "memory: memfd": (
        "import os\nfd = os.memfd_create('x')\nos.truncate(fd, 1 << 30)\nprint('THROUGH')",
        {"failed"},
    ),
    "memory: System V": (
        "import ctypes\nlibc = ctypes.CDLL(None)\n"
        "if libc.shmget(0, 1 << 20, 0o1600) >= 0: print('THROUGH')",
        {"passed"},
    ),
    "memory: POSIX shared": (
        "from multiprocessing import shared_memory\n"
        "shared_memory.SharedMemory(create=True, size=1 << 30)\nprint('THROUGH')",
        {"failed"},
    ),
    "memory: pipes": (
        "import os, fcntl\nn = 0\n"
        "try:\n"
        "    while True:\n"
        "        r, w = os.pipe(); os.set_blocking(w, False)\n"
        "        fcntl.fcntl(w, 1031, 1 << 20)\n"
        "        n += os.write(w, b'x' * (1 << 20))\n"
        "except OSError: pass\n"
        "if n > 8 << 20: print('THROUGH')",
        {"passed"},
    ),
    "memory: in many threads": (
        "import threading\nheld = []\n"
        "def grow():\n    while True: held.append(bytearray(1 << 20))\n"
        "threads = [threading.Thread(target=grow) for _ in range(4)]\n"
        "for t in threads: t.start()\nfor t in threads: t.join()\nprint('held', len(held))\n"
        "if len(held) > 700: print('THROUGH')",
        {"memory", "passed"},
    ),
    "disk": (
        "n = 0\n"
        "try:\n"
        "    for i in range(1000):\n"
        "        with open(f'/tmp/{i}', 'wb', 0) as f:\n"
        "            for _ in range(8): n += f.write(bytes(1 << 20))\n"
        "except OSError: pass\n"
        "if n > 65 << 20: print('THROUGH')",
        {"passed"},
    ),
    "one huge file": ("f = open('x', 'wb')\nwhile True: f.write(bytes(1 << 20))", {"output"}),
    "sparse file": (
        "import os\nf = open('x', 'wb')\nos.truncate(f.fileno(), 1 << 40)\nprint('THROUGH')",
        {"output", "failed"},
    ),
    "inodes": (
        "import os\nn = 0\n"
        "try:\n    for n in range(100000): os.mkdir(f'/tmp/{n}')\n"
        "except OSError: pass\n"
        "if n > 2000: print('THROUGH')",
        {"passed"},
    ),
    "deep folders": (
        "import os\n"
        "try:\n    for _ in range(30000): os.mkdir('d'); os.chdir('d')\n"
        "except OSError: pass",
        {"passed"},
    ),
    "descriptors": (
        "import os\nn = 0\n"
        "try:\n    for n in range(100000): os.open('/dev/null', os.O_RDONLY)\n"
        "except OSError: pass\n"
        "if n > 100: print('THROUGH')",
        {"passed"},
    ),
    "output": ("while True: print('x' * 10000)", {"output"}),
    "output of errors": ("import sys\nwhile True: sys.stderr.write('x' * 10000)", {"output"}),
    "output that catches": (
        "import os, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "while True:\n    try: os.write(1, b'x' * 10000)\n    except OSError: pass",
        {"output"},
    ),
    "output by truncate": ("import os\nos.ftruncate(1, 10 << 20)", {"output"}),
    "TCP to the host": (
        "import socket\nsocket.create_connection(('127.0.0.1', @port@), 1)\nprint('THROUGH')",
        {"failed"},
    ),
    "UDP": (
        "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "s.sendto(b'x', ('127.0.0.1', @port@))\nprint('THROUGH')",
        {"failed"},
    ),
    "names": ("import socket\nprint(socket.gethostbyname('example.org'), 'THROUGH')", {"failed"}),
    "unix socket": (
        "import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect('@unix@')\nprint('THROUGH')",
        {"failed"},
    ),
    "abstract socket": (
        "import socket\ns = socket.socket(socket.AF_UNIX)\ns.bind('\\0x')\nprint('THROUGH')",
        {"failed"},
    ),
    "vsock": (
        "import socket\nsocket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)\nprint('THROUGH')",
        {"failed"},
    ),
    "netlink": (
        "import socket\nsocket.socket(socket.AF_NETLINK, socket.SOCK_RAW)\nprint('THROUGH')",
        {"failed"},
    ),
    "server": ("import http.server\nhttp.server.HTTPServer(('', 0), None)\nprint('THROUGH')",
               {"failed"}),
    "read a file of the host": ("print(open('@canary@').read(), 'THROUGH')", {"failed"}),
    "read what every system has": (
        "import os\n"
        "for path in ('/etc/passwd', '/etc/hostname', '/etc/resolv.conf', '/proc/self/environ',\n"
        "             '/proc/1/cmdline', '/sys/kernel', '/root', '/home', '/var', '/run'):\n"
        "    try: entries = os.listdir(path) if os.path.isdir(path) else open(path).read(1)\n"
        "    except OSError: continue\n"
        "    if len(entries) > 2: print('THROUGH', path, entries)",  # the way to the interpreter
        {"passed"},
    ),
    "escape by ..": (
        "import os\nfd = os.open('/', os.O_RDONLY)\n"
        "for _ in range(50): os.chdir('..')\n"
        "if set(os.listdir('.')) & {'home', 'boot', 'var', 'work'}: print('THROUGH')",
        {"passed"},
    ),
    "chroot": ("import os\nos.mkdir('r')\nos.chroot('r')\nprint('THROUGH')", {"failed"}),
    "environment": (
        "import os, ctypes\n"
        "text = str(os.environ) + str(ctypes.string_at(ctypes.c_char_p.in_dll(\n"
        "    ctypes.pythonapi, 'Py_FileSystemDefaultEncoding'), 0))\n"
        "if 'SECRET_OF_HOST' in text or 'USER' in os.environ: print('THROUGH')",
        {"passed"},
    ),
    "memory of the parent": (
        "import os\n"
        "for pid in (1, os.getppid()):\n"
        "    for name in ('mem', 'environ', 'maps', 'root', 'cwd', 'fd'):\n"
        "        if os.path.lexists(f'/proc/{pid}/{name}'): print('THROUGH')",
        {"passed"},
    ),
    "write outside": (
        "import os, sys\n"
        "for path in ('/x', '/usr/x', '/dev/x', '/etc/x', os.path.dirname(os.__file__) + '/x',\n"
        "             os.__file__, '/dev/shm/x'):\n"
        "    try: open(path, 'a').write('x')\n"
        "    except OSError: continue\n"
        "    print('THROUGH', path)",
        {"passed"},
    ),
    "remount": (
        "import ctypes, os\nlibc = ctypes.CDLL(None)\n"
        "if libc.mount(b'none', b'/', None, 32 | 4096, None) == 0: print('THROUGH')\n"
        "if libc.umount2(b'/tmp', 2) == 0 or libc.unshare(0x10000000) == 0: print('THROUGH')",
        {"passed"},
    ),
    "kill the host's processes": (
        "import os, signal\n"
        "for pid in [*range(1, 5), @pid@, @other@]:\n"
        "    if pid == os.getpid(): continue\n"
        "    try: os.kill(pid, signal.SIGKILL)\n"
        "    except OSError: pass",
        {"passed"},
    ),
    "signal the init": (
        "import os\n"
        "for n in range(1, 65):\n"
        "    try: os.kill(1, n)\n"
        "    except OSError: pass",
        {"passed"},
    ),
    "kill all": ("import os\nos.kill(-1, 9)\nos.kill(0, 9)", STATUSES),
    "trace the parent": (
        "import ctypes, os\nlibc = ctypes.CDLL(None)\n"
        "for pid in (1, os.getppid(), @pid@):\n"
        "    if libc.ptrace(16, pid, 0, 0) == 0: print('THROUGH')\n"
        "    if libc.process_vm_readv(pid, None, 0, None, 0, 0) == 0: print('THROUGH')",
        {"passed"},
    ),
    "limits of the parent": (
        "import resource, os\n"
        "for pid in (1, os.getppid(), @pid@):\n"
        "    try: resource.prlimit(pid, resource.RLIMIT_CPU, (0, 0))\n"
        "    except OSError: continue\n"
        "    print('THROUGH')",
        {"passed"},
    ),
    "raise own limits": (
        "import resource\n"
        "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))\nprint('THROUGH')",
        {"failed"},
    ),
    "keyring": (
        "import ctypes\nlibc = ctypes.CDLL(None)\n"
        "if libc.syscall(248, b'user', b'x', b'y', 1, -4) > 0: print('THROUGH')",
        {"passed"},
    ),
    "io_uring, bpf, perf, userfaultfd": (
        "import ctypes\nlibc = ctypes.CDLL(None)\nroom = ctypes.create_string_buffer(256)\n"
        "for n in (425, 321, 298, 323, 272, 165, 155, 308, 310, 311, 317, 435):\n"
        "    if libc.syscall(n, 1, room, 0, 0, 0, 0) >= 0: print('THROUGH', n)",
        {"passed"},
    ),
    "locks on host files": (
        "import fcntl, os\nfcntl.flock(os.open(os.__file__, os.O_RDONLY), fcntl.LOCK_EX)\n"
        "print('THROUGH')",
        {"failed"},
    ),
    "type into the terminal": (
        "import fcntl\nfor fd in (0, 1, 2): fcntl.ioctl(fd, 0x5412, b'x')\nprint('THROUGH')",
        {"failed"},
    ),
    "inherited descriptors": (
        "import os\n"
        "for fd in range(3, 1000):\n"
        "    try: os.write(fd, b'{\"passed\": true}')\n"
        "    except OSError: continue\n"
        "    print('THROUGH', fd)",
        {"passed"},
    ),
    "change own input": (
        "import os\nos.write(0, b'x')\nprint('THROUGH')", {"failed"}
    ),
    "native crash": ("import ctypes\nctypes.string_at(0)", {"crashed"}),
    "abort": ("import os\nos.abort()", {"crashed"}),
    "stack overflow": (
        "import sys, threading\nsys.setrecursionlimit(10**9)\n"
        "class A:\n    def __getattr__(self, n): return getattr(self, n)\nA().x",
        {"crashed", "failed", "memory", "timeout"},
    ),
    "NUL in the program": ("print('x')\0print('THROUGH')", {"failed"}),
    "syntax": ("(" * 100000, {"failed", "memory", "crashed"}),
    "not text": ("\ud800", {"failed"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """Things of the host that an attack may reach for."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    canary = folder / "canary"
    canary.write_text("canary")
    os.environ["SECRET_OF_HOST"] = "SECRET_OF_HOST"
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    listener = socket.create_server(("127.0.0.1", 0))
    unix = socket.socket(socket.AF_UNIX)
    unix.bind(str(folder / "socket"))
    (folder / "socket").chmod(0o777)
    unix.listen()
    yield {
        "canary": str(canary),
        "port": listener.getsockname()[1],
        "unix": str(folder / "socket"),
        "pid": os.getpid(),
        "other": sleeper.pid,
    }
    assert sleeper.poll() is None, "a program killed a process of the host"
    assert canary.read_text() == "canary"
    sleeper.kill()
    sleeper.wait()
    for each in (listener, unix):
        each.close()
    del os.environ["SECRET_OF_HOST"]
    for path in (folder / "socket", canary):
        path.unlink()
    folder.rmdir()


@pytest.mark.parametrize("name", ATTACKS)
def test_held(name, pool, host):
    program, statuses = ATTACKS[name]
    for key, value in host.items():
        program = program.replace(f"@{key}@", str(value))
    timeout_s = 0.7 if "timeout" in statuses or name == "output that catches" else 10
    begin = time.monotonic()
    outcome = pool.run(program, timeout_s=timeout_s, memory_bytes=256 << 20)
    assert outcome.status in statuses, outcome
    assert "THROUGH" not in outcome.stdout, outcome
    assert len(outcome.stdout) <= 1 << 20
    assert time.monotonic() - begin < timeout_s + 5
    assert pool.run("print(1)").stdout == "1\n"  # the jail is as it was
