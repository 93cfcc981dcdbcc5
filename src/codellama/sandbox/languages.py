"""The languages of programs, and the commands that compile and run them inside the jail.

Python runs in a process of the zygote (programs.py); all others are files below /tmp and commands.
A language whose toolchain is not installed is refused by name, never skipped silently.
"""

from __future__ import annotations

import glob
import os
import shutil
from dataclasses import dataclass, field

_HOME = "/tmp"
# rustc on PATH is often a starter that looks for the toolchain in a home: here the latter itself.
_RUST = sorted(glob.glob(os.path.expanduser("~/.rustup/toolchains/*/bin")), reverse=True)
_SEARCH = ":".join(
    ["/usr/local/bin:/usr/bin:/bin:/usr/local/go/bin", *_RUST, os.environ.get("PATH", "")]
)


@dataclass(frozen=True)
class Language:
    """How a program of one language becomes an exit status."""

    name: str
    file: str
    """Name of the program's text below /tmp."""
    commands: tuple[str, ...]
    """Compiler commands, then the one that runs; the first word of each is looked up on PATH,
    unless it is the program that was made."""
    limits_address_space: bool = True
    """Whether RLIMIT_AS suits it; virtual machines reserve more than they use, and are bounded by
    their data and by the memory of the whole tree."""
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """All that a program finds in its environment."""
        path = "/usr/local/bin:/usr/bin:/bin"
        return {"PATH": path, "HOME": _HOME, "TMPDIR": _HOME, "LANG": "C.UTF-8", **self.variables}


_JAVA = (
    "javac -J-XX:TieredStopAtLevel=1 -J-XX:-UsePerfData -nowarn Main.java",
    "java -XX:+UseSerialGC -XX:TieredStopAtLevel=1 -Xms16m -Xss64m -ea Main",
)
JAVATUPLES = "/usr/share/java/javatuples.jar"  # what MultiPL-E imports
_TSC = "tsc --target es2020 --module commonjs main.ts"
_MCS = "mcs -d:DEBUG -r:System.Numerics.dll -out:main.exe main.cs"
_GO_VARIABLES = {"GOCACHE": f"{_HOME}/.cache", "GOFLAGS": "-mod=mod", "GO111MODULE": "off"}
LANGUAGES = {
    language.name: language
    for language in (
        Language("python", "main.py", ()),
        Language("bash", "main.sh", ("bash main.sh",)),
        # Unoptimised: a function without its return must not skip the tests behind it.
        Language("cpp", "main.cpp", ("g++ -std=c++17 -w -o main main.cpp", "./main")),
        Language("java", "Main.java", _JAVA, False, {"CLASSPATH": f".:{JAVATUPLES}"}),
        Language("javascript", "main.js", ("node main.js",), False),
        Language("typescript", "main.ts", (_TSC, "node main.js"), False),
        Language("php", "main.php", ("php main.php",)),
        Language("csharp", "main.cs", (_MCS, "mono main.exe"), False),
        Language("go", "main.go", ("go build -o main main.go", "./main"), False, _GO_VARIABLES),
        Language("rust", "main.rs", ("rustc -o main main.rs", "./main"), False),
        Language("ruby", "main.rb", ("ruby main.rb",)),
        Language("lua", "main.lua", ("lua main.lua",)),
    )
}
ALIASES = {
    "py": "python", "sh": "bash", "c++": "cpp", "cc": "cpp", "js": "javascript",
    "ts": "typescript", "cs": "csharp", "c#": "csharp", "rs": "rust", "rb": "ruby",
}  # fmt: skip


def find_language(name: str) -> Language:
    """The language of a name or file ending.

    Raises:
        ValueError: no such language; the message lists those that exist.
    """
    name = name.lower()
    language = LANGUAGES.get(ALIASES.get(name, name))
    if language is None:
        raise ValueError(f"language {name!r}: one of {', '.join(LANGUAGES)} is accepted")
    return language


def locate(program: str) -> str | None:
    """The file of a program on this machine."""
    return shutil.which(program, path=_SEARCH)


def commands_of(language: Language) -> tuple[list[list[str]], str]:
    """(commands with full paths, name of the first program that is missing or an empty string)."""
    found = []
    for command in language.commands:
        program, *arguments = command.split()
        path = program if program.startswith("./") else locate(program)
        if path is None:
            return [], program
        found.append([path, *arguments])
    return found, ""


def installed_programs() -> list[str]:
    """The files of all toolchain programs on this machine."""
    names = {command.split()[0] for each in LANGUAGES.values() for command in each.commands}
    return sorted(filter(None, (locate(name) for name in names if not name.startswith("./"))))
