"""Real attacks, made once before anything else runs: settings that look right can still be dead.

Each is a program in the jail that tries what a hostile one would. All must be held, and the program
must say so itself, so that a sandbox in which nothing runs at all is found out as well.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import tempfile
from contextlib import closing

from codellama.sandbox.jailer import NoIsolationError
from codellama.sandbox.languages import LANGUAGES, commands_of
from codellama.sandbox.outcome import Limits
from codellama.sandbox.worker import Worker

_ATTACKS = """
import os, socket, json
through = []
def attack(name):
    def decorate(function):
        try:
            function()
            through.append(name)
        except OSError:
            pass
    return decorate
@attack("read a file of the host")
def _(): open({canary!r}).read()
@attack("read /proc")
def _(): os.listdir("/proc/1")
@attack("connect to the host")
def _(): socket.create_connection(("127.0.0.1", {port}), 1)
@attack("make a process")
def _():
    if os.fork() == 0: os._exit(0)
@attack("start a program")
def _(): os.execv("/bin/true", ["true"])
for folder in ("/", "/usr", "/usr/lib", "/dev", "/var/tmp", os.path.dirname(os.__file__)):
    @attack("write to " + folder)
    def _(): open(folder + "/canary", "w")
@attack("kill the first process")
def _():
    os.kill(1, 9)
    os.kill(1, 0)
    os.mkdir("alive")
    os.rmdir("/nothing")
if os.environ.get({variable!r}): through.append("read the host's environment")
print(json.dumps(through))
"""
_SHELL_ATTACKS = """
read -r text < {canary} && echo "read a file of the host"
(echo > /dev/tcp/127.0.0.1/{port}) && echo "connect to the host"
for folder in / /usr /usr/bin /dev /var/tmp; do
  (echo > $folder/canary) && echo "write to $folder"
done
found=(/proc/[0-9]*); [ ${{#found[@]}} -lt 6 ] || echo "see processes of the host"
[ -e /proc/sys ] && echo "read settings of the host"
unshare -U true && echo "make namespaces"
[ -n "${variable}" ] && echo "read the host's environment"
echo done
"""
_LIMITS = Limits(timeout_s=10, memory_bytes=64 << 20)
_MEMORY = "held = bytearray(256 << 20)\nheld[::4096] = b'x' * len(held[::4096])\nprint('through')"


def check(worker: Worker, kind: str) -> None:
    """Attack one jail of a worker.

    Raises:
        NoIsolationError: something got through; the message names it.
    """
    variable = f"CANARY_{secrets.token_hex(4)}"
    with (
        tempfile.NamedTemporaryFile() as canary,
        closing(socket.create_server(("127.0.0.1", 0))) as server,
    ):
        os.chmod(canary.name, 0o644)
        os.environ[variable] = "x"
        try:
            values = {"canary": canary.name, "port": server.getsockname()[1], "variable": variable}
            through = (_python if kind == "candidate" else _shell)(worker, values)
        finally:
            del os.environ[variable]
    if through:
        raise NoIsolationError(f"the sandbox does not hold; a program could: {', '.join(through)}")


def _python(worker: Worker, values: dict) -> list[str]:
    """What got through."""
    language = LANGUAGES["python"]
    outcome = worker.run(_ATTACKS.format(**values), "", language, [], _LIMITS)
    if outcome.status != "passed":
        raise NoIsolationError(f"the sandbox's probe did not run: {outcome.message}")
    through = json.loads(outcome.stdout)
    if worker.run(_MEMORY, "", language, [], _LIMITS).status != "memory":
        through.append("exceed the memory limit")
    return through


def _shell(worker: Worker, values: dict) -> list[str]:
    bash = LANGUAGES["bash"]
    commands, missing = commands_of(bash)
    if missing:
        raise NoIsolationError("the sandbox's probe for other languages needs bash")
    outcome = worker.run(_SHELL_ATTACKS.format(**values), "", bash, commands, _LIMITS)
    return [] if outcome.stdout == "done\n" else outcome.stdout.splitlines() or [outcome.message]
