"""The candidate's end: load the program, then do what the judge asks for.

Nothing here is trusted by the judge; a program that changes it changes only its own answers.
"""

from __future__ import annotations

import contextlib
import sys
from types import ModuleType
from typing import Any

from codellama.sandbox import codec, programs
from codellama.sandbox.link import LineError, Link

_MUTABLE = (list, dict, set, bytearray)


def serve(source: bytes) -> int:
    """Run the program's own code, then answer until the judge hangs up; returns an exit status."""
    module = ModuleType("candidate")  # not __main__: a demo at the end of a file is not run
    sys.modules["candidate"] = module
    code = programs.run_code(source, "candidate.py", module)
    if code is not None:  # it raised, or ended itself, before there was anything to judge
        return programs.finish(code)
    operations = {
        "names": lambda names: [_describe(module.__dict__, name) for name in names],
        "call": _call,
        "special": lambda value, name, arguments: getattr(type(value), name)(value, *arguments),
        "get": getattr,
        "set": setattr,
        "isinstance": isinstance,
    }

    def answer(op: str, *arguments: Any) -> Any:
        return operations[op](*arguments)

    _Callback.link = Link(programs.link_socket(), answer, _Callback, lambda _: True)
    with contextlib.suppress(LineError):
        _Callback.link.serve_forever()
    return programs.finish(0)


class _Callback:
    """A function or iterator of the tests, as the candidate sees it."""

    link: Link

    def __init__(self, number: int) -> None:
        self.remote_number = number

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        result, _ = self.link.ask("call", self, arguments, named)
        return result

    def __iter__(self) -> _Callback:
        return self

    def __next__(self) -> Any:
        return self.link.ask("next", self)


def _describe(names: dict[str, Any], name: str) -> Any:
    """What a name is: absent, plain data, from a module, an exception class, an object."""
    if name not in names:
        return None
    value = names[name]
    if isinstance(value, ModuleType):
        return ("module", value.__name__)
    home = sys.modules.get(getattr(value, "__module__", None) or "")
    qualified = getattr(value, "__name__", None) or getattr(value, "_name", None)
    is_elsewhere = home is not sys.modules["candidate"]
    if home and is_elsewhere and getattr(home, str(qualified), None) is value:
        return ("from", home.__name__, qualified, value)
    if isinstance(value, type) and issubclass(value, BaseException):
        known = next(k for k in value.__mro__ if k.__module__ == "builtins")
        return ("exception", known.__name__, value)
    return ("value", isinstance(value, type), value)


def _call(function: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """The result, and what became of arguments that the call changed in place."""
    before = {i: a for i, a in enumerate(arguments) if type(a) in _MUTABLE}
    coded = {i: _coded(a) for i, a in before.items()}
    result = function(*arguments, **named)
    changed = {i: a for i, a in before.items() if _coded(a) != coded[i]}
    return result, changed


def _coded(value: Any) -> bytes:
    return codec.encode(value, _Callback.link._refer)
