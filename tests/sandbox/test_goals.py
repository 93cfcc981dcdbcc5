"""S1, S2 and S5 in full: every program as an ordinary user, a soak, and zygotes that are killed."""

import contextlib
import gc
import json
import os
import random
import re
import signal
import subprocess
import threading
from collections import Counter

import pytest
from test_faults import ROOT, children, kill_if_there, ordinary_python, wait_until
from test_hostile import ATTACKS, host  # noqa: F401 - a fixture
from test_judge import FORGERIES, RIGHT, TESTS

from codellama.sandbox import Pool
from codellama.sandbox.jailer import tree_bytes

pytestmark = pytest.mark.slow
N_RUNS, N_KILLS = 5000, 200

# What is run in the soak, and how each must end.
MIX = [
    ("passed", {"program": "print(input()[::-1])", "stdin": "abc"}),
    ("failed", {"program": "raise SystemExit(3)"}),
    ("crashed", {"program": "import os\nos.abort()"}),
    ("output", {"program": "while True: print('x' * 999)", "output_bytes": 5000}),
    ("memory", {"program": "x = bytearray(1 << 30)"}),
    ("passed", {"candidate": "def f(x): return x * x", "tests": TESTS}),
    ("failed", {"candidate": "def f(x): return x", "tests": TESTS}),
    ("failed", {"candidate": "import os\ndef f(x): os._exit(0)", "tests": TESTS}),
    ("failed", {"candidate": "raise ValueError", "tests": TESTS}),
]
SLOW = ("timeout", {"program": "while True: pass", "cpu_s": 0.2, "timeout_s": 20})


def do(pool, call):
    return (pool.judge if "tests" in call else pool.run)(**{"timeout_s": 60, **call})


def test_s2_soak():
    calls = [SLOW if n % 100 == 99 else MIX[n % len(MIX)] for n in range(N_RUNS)]
    before = children()
    with Pool(n_workers=2) as pool:

        def part(begin, end):
            threads = [
                threading.Thread(target=lambda k=k: seen.extend(
                    (n, do(pool, calls[n][1]).status) for n in range(begin + k, end, 2)))
                for k in range(2)
            ]  # fmt: skip
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        def sizes():
            gc.collect()
            descriptors = len(os.listdir("/proc/self/fd"))
            return len(children()), descriptors, tree_bytes(os.getpid())

        seen = []
        part(0, 300)
        processes, descriptors, size = sizes()
        part(300, N_RUNS)
        wait_until(lambda: len(children()) == processes)
        assert sizes()[1] == descriptors
        assert sizes()[2] - size < 20 << 20
    wrong = [(n, calls[n][0], status) for n, status in seen if status != calls[n][0]]
    assert not wrong
    assert len(seen) == N_RUNS
    wait_until(lambda: children() == before)


def test_s5_killed_and_stopped_zygotes():
    """At random moments: each run ends right, repeated at most once, and nobody stays."""
    before, rng, retries = children(), random.Random(1), Counter()
    with Pool(n_workers=1) as pool:
        assert pool.judge("def f(x): return x", "assert f(1) == 1").passed
        for n in range(N_KILLS):
            victim = rng.choice(sorted(children() - before))
            kill = signal.SIGSTOP if n % 8 == 0 else signal.SIGKILL
            killer = threading.Timer(rng.uniform(0, 0.1), kill_if_there, [victim, kill])
            killer.start()
            if n % 2:
                outcome = pool.run("import time\ntime.sleep(0.05)\nprint(1)", timeout_s=5)
            else:
                slow = "import time\ndef f(x):\n    time.sleep(0.05)\n    return x"
                outcome = pool.judge(slow, "assert f(1) == 1", timeout_s=5)
            killer.join()
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGCONT)  # it may have been stopped after its run
            assert outcome.passed, (n, kill, outcome)
            retries[outcome.n_retries] += 1
    assert set(retries) == {0, 1}
    wait_until(lambda: not children() - before)


AS_USER = """
import json, os, sys
from codellama.sandbox import Pool
assert os.getuid() == 65534
runs, judged = json.load(sys.stdin)
with Pool(n_workers=2) as pool:
    done = pool.run_many(runs), pool.judge_many(judged)
    print(json.dumps([[o.as_dict() for o in outcomes] for outcomes in done]))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="all other tests run without privileges already")
def test_s1_every_program_as_an_ordinary_user(host):  # noqa: F811
    python = ordinary_python()
    user = {"user": 65534, "group": 65534, "extra_groups": [], "cwd": "/"}
    sleeper = subprocess.Popen([python, "-c", "import time; time.sleep(3600)"], **user)
    reach = {**host, "pid": sleeper.pid, "other": sleeper.pid}  # what this user could kill
    limits = {"timeout_s": 15, "cpu_s": 0.7, "memory_bytes": 256 << 20}
    runs = {}
    for name, (program, _) in ATTACKS.items():
        for key, value in reach.items():
            program = program.replace(f"@{key}@", str(value))
        assert not re.search("@[a-z]+@", program), name
        if name in ("read a file of the host", "TCP to the host", "unix socket"):
            # Without the sandbox the same user gets through: there is something to hold.
            free = subprocess.run([python, "-c", program], **user, capture_output=True, text=True)
            assert "THROUGH" in free.stdout, (name, free)
        if name not in ("not text", "sleep", "wait for input", "threads that never end"):
            runs[name] = {"program": program, **limits}
    judged = {n: {"candidate": c, "tests": TESTS, **limits} for n, c in FORGERIES.items()}
    right = {n: {"candidate": c, "tests": t, **more, "timeout_s": 30}
             for n, (c, t, more) in RIGHT.items()}  # fmt: skip
    calls = [list(runs.values()), [*judged.values(), *right.values()]]
    environment = {"PYTHONPATH": str(ROOT / "src"), "SECRET_OF_HOST": "SECRET_OF_HOST"}
    done = subprocess.run([python, "-B", "-c", AS_USER], **user, input=json.dumps(calls),
                          env=environment, capture_output=True, text=True,
                          timeout=900)  # fmt: skip
    was_killed = sleeper.poll() is not None
    sleeper.kill()
    sleeper.wait()
    assert not was_killed
    assert done.returncode == 0, done.stderr
    ran, verdicts = json.loads(done.stdout)
    assert not [o for o in [*ran, *verdicts] if o["status"] in ("error", "refused")]
    for name, outcome in zip(runs, ran, strict=True):
        assert "THROUGH" not in outcome["stdout"], name
    passed = {
        n for n, o in zip([*judged, *right], verdicts, strict=True) if o["status"] == "passed"
    }
    assert passed == set(right)
    assert len(runs) + len(judged) == 114
    assert len(right) > 20
