"""Tricks on the line to the judge, on the compiler, and on what the limits do not name."""

import time

import pytest

from codellama.sandbox.languages import LANGUAGES, commands_of

SQUARES = "assert f(2) == 4\nassert f(3) == 9\n"
# name -> (candidate, tests, statuses that it may end with); each is wrong.
JUDGED = {
    "a range that the judge would write out": (
        "def f(x): return range(10**12)", "assert list(f(2)) == [4]", {"memory"}),
    "an object that never ends": (
        "class A:\n    def __iter__(self): return iter(int, 1)\ndef f(x): return A()",
        "assert sorted(f(2)) == [4]", {"timeout", "memory"}),
    "a decimal of a billion digits": (
        "from decimal import Decimal\ndef f(x): return Decimal('1e999999999')",
        "assert int(f(2)) == 4", {"memory", "timeout"}),
    "keys that collide": ("def f(x): return {i * (2**61 - 1): 0 for i in range(1, 99999)}",
                          SQUARES, {"timeout"}),
    "lists that double": (
        "def f(x):\n    v = [0]\n    for _ in range(60): v = [v, v]\n    return v",
        SQUARES, {"timeout", "memory", "failed"}),
    "the two call each other": (
        "def f(g, x):\n    def h(y): return g(h, y)\n    return g(h, x)",
        "assert f(lambda h, y: h(y), 1) == 4", {"failed"}),
    "what the tests' function knows": (
        "def f(g, x):\n    for name in ('__globals__', '__code__', '__closure__', 'gi_frame'):\n"
        "        if hasattr(g, name): return 4\n    return g.__call__.__self__.__globals__['n']",
        "n = 4\nassert f(lambda x: n, 2) == 4", {"failed"}),
    "threads that talk at once": (
        "import threading\ndef f(g, x):\n    def spin():\n        while True: g(1)\n"
        "    for _ in range(8): threading.Thread(target=spin, daemon=True).start()\n"
        "    return [g(i) for i in range(200)]",
        "assert f(lambda x: x + 1, 2) == 4", {"failed", "timeout"}),
    "half a message": (
        "import os, struct, time\ndef f(x):\n    os.write(4, struct.pack('<I', 1 << 20) + b't')\n"
        "    time.sleep(99)", SQUARES, {"timeout"}),
    "the line replaced": ("import os\ndef f(x): os.close(4); os.dup2(1, 4); return 4",
                          SQUARES, {"failed"}),
    "an error whose text never ends": (
        "class E(Exception):\n    def __repr__(self):\n        while True: pass\n"
        "def f(x): raise E(E())", SQUARES, {"timeout"}),
    "an error of half characters": ("def f(x): raise ValueError('\\ud800\\0\\x1b[2J' * 9999)",
                                    SQUARES, {"failed"}),
    "stops itself": ("import os, signal\ndef f(x): os.kill(os.getpid(), signal.SIGSTOP)",
                     SQUARES, {"timeout"}),
}  # fmt: skip

RUN = {
    "stops itself": ("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", {"timeout"}),
    "attributes of files": (
        "import os\nopen('x', 'w').close()\nn = 0\n"
        "try:\n    for n in range(99): os.setxattr('x', f'user.{n}', bytes(60000))\n"
        "except OSError: pass\nif n: print('THROUGH')", {"passed"}),
    "watches of files": (
        "import ctypes, fcntl, os\nlibc = ctypes.CDLL(None)\n"
        "for n in (253, 294, 300, 303, 304):\n"
        "    if libc.syscall(n, 0, 0, 0, 0, 0) >= 0: print('THROUGH', n)\n"
        "fd = os.open(os.path.dirname(os.__file__), os.O_RDONLY)\n"
        "for command, value in ((1026, 2), (8, 1), (10, 9), (1024, 1)):\n"
        "    try: fcntl.fcntl(fd, command, value)\n"
        "    except OSError: continue\n    print('THROUGH', command)", {"passed"}),
    "deleted files that stay open": (
        "import os\nn, held = 0, []\n"
        "try:\n    for _ in range(9):\n"
        "        held.append(os.open('x', os.O_CREAT | os.O_RDWR)); os.unlink('x')\n"
        "        n += os.write(held[-1], bytes(15 << 20))\n"
        "except OSError: pass\nif n > 65 << 20: print('THROUGH')", {"passed"}),
    "scheduling": (
        "import os\n"
        "for change in (lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50)),\n"
        "               lambda: os.nice(-5), lambda: os.sched_setaffinity(0, {0}),\n"
        "               lambda: os.setpriority(os.PRIO_PROCESS, 0, -10)):\n"
        "    try: change()\n    except OSError: continue\n    print('THROUGH')", {"passed"}),
    "the kernel's log, clock, name and personality": (
        "import ctypes\nlibc = ctypes.CDLL(None)\nroom = ctypes.create_string_buffer(4096)\n"
        "if libc.klogctl(3, room, 4096) >= 0 or libc.sethostname(b'x', 1) == 0: print('THROUGH')\n"
        "if libc.settimeofday(room, None) == 0 or libc.personality(0x40000) >= 0: print('THROUGH')",
        {"passed"}),
    "descriptors in flight": (
        "import os, socket\na, b = socket.socketpair()\nn = 0\n"
        "try:\n    for n in range(9999):\n        fd = os.open('/dev/null', os.O_RDONLY)\n"
        "        socket.send_fds(a, [b'x'], [fd]); os.close(fd)\n"
        "except OSError: pass\nif n > 1000: print('THROUGH')", {"passed"}),
    "memory in sockets": (
        "import socket\nn, held = 0, []\n"
        "try:\n    while True:\n        held += socket.socketpair()\n"
        "        held[-1].setblocking(False)\n"
        "        try:\n            while True: n += held[-1].send(bytes(1 << 16))\n"
        "        except BlockingIOError: pass\n"
        "except OSError: pass\nif n > 64 << 20: print('THROUGH')", {"passed"}),
}  # fmt: skip

COMPILED = {
    "the host's file in the binary": (
        'asm(".globl s\\ns: .incbin \\"/etc/passwd\\"\\n"); extern char s[];\n'
        'extern "C" int puts(const char*);\nint main() { puts(s); puts("THROUGH"); }', {"failed"}),
    "a device included": ('#include "/dev/zero"\nint main() {}', {"memory", "failed", "timeout"}),
    "a giant binary": ("char x[1u << 30] = {1};\nint main() { return x[5]; }", {"failed"}),
    "endless templates": (
        "template<int N> struct A { A<N + 1> a; A<N + 2> b; };\nint main() { A<0> a; }",
        {"failed", "memory", "timeout"}),
    "children that leave the session": (
        "#include <cstdio>\n#include <cstdlib>\n#include <unistd.h>\n"
        "int main() {\n  for (int i = 0; i < 20; i++) if (!fork()) {\n    setsid();\n"
        "    volatile char* p = (char*)malloc(60u << 20);\n"
        "    for (size_t k = 0; k < 60u << 20; k += 4096) p[k] = 1;\n"
        '    sleep(9); _exit(0);\n  }\n  sleep(8); puts("THROUGH");\n}', {"memory"}),
}  # fmt: skip


@pytest.mark.parametrize("name", JUDGED)
def test_judged(name, pool):
    candidate, tests, statuses = JUDGED[name]
    limits = {"timeout_s": 1.0 if "timeout" in statuses else 20, "memory_bytes": 256 << 20}
    begin = time.monotonic()
    outcome = pool.judge(candidate, tests, **limits)
    assert outcome.status in statuses, outcome
    assert outcome.n_retries == 0
    assert time.monotonic() - begin < limits["timeout_s"] + 5
    assert pool.judge("def f(x): return x * x", SQUARES, timeout_s=20).passed


@pytest.mark.parametrize("name", RUN)
def test_run(name, pool):
    program, statuses = RUN[name]
    outcome = pool.run(program, timeout_s=1.0 if "timeout" in statuses else 20)
    assert outcome.status in statuses, outcome
    assert "THROUGH" not in outcome.stdout, outcome


@pytest.mark.parametrize("name", COMPILED)
def test_compiled(name, pool):
    if commands_of(LANGUAGES["cpp"])[1]:
        pytest.skip("no C++ compiler")
    program, statuses = COMPILED[name]
    limits = {"timeout_s": 12, "compile_timeout_s": 5, "memory_bytes": 256 << 20}
    outcome = pool.run(program, language="cpp", **limits)
    assert outcome.status in statuses, outcome
    assert "THROUGH" not in outcome.stdout
