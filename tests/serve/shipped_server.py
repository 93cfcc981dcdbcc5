"""`codellama serve` with the model of the package, in a process of its own."""

import socket
import subprocess
import sys
from contextlib import contextmanager


@contextmanager
def shipped_server():
    """Yield its URL once it serves."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "codellama", "serve", "--port", port]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        line = process.stderr.readline()
        assert "serving" in line, line + process.stderr.read()
        yield f"http://127.0.0.1:{port}"
        process.terminate()
