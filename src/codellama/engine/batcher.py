"""The batcher: runs everything that was submitted, step by step, in one thread.

The thread lives as long as there is work. Callers in any thread submit a sequence, hear of news
through a callback, and may cancel at any time; what fails, fails alone where it can. Sequences
change only under the lock, which is never held during a forward pass.
"""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterable

from codellama.engine.runner import Chosen, Runner
from codellama.engine.scheduler import Scheduler
from codellama.engine.sequence import Sequence
from codellama.engine.speculate import Speculator

_log = logging.getLogger(__name__)


def where(error: BaseException) -> str:
    """Kind and place of an error for a log; no message and no path, which may tell of people."""
    frames = traceback.walk_tb(error.__traceback__)
    places = [f"{f.f_globals.get('__name__')}.{f.f_code.co_name}:{line}" for f, line in frames]
    return f"{type(error).__name__} in {', '.join(places)}"


class Batcher:
    """Owns the scheduler and the thread that runs what it decides."""

    def __init__(
        self, runner: Runner, scheduler: Scheduler[Sequence], speculator: Speculator
    ) -> None:
        self.lock = threading.RLock()
        self.scheduler = scheduler
        self._runner, self._speculator = runner, speculator
        self._listeners: dict[Sequence, Callable[[], object]] = {}
        self._streamed: set[Sequence] = set()
        self._in_step: set[Sequence] = set()
        """What the pass that runs now reads and writes; its blocks must stay until it ends."""
        self._thread: threading.Thread | None = None
        self.failure: str | None = None
        """Why the thread died, after which nothing can run any more."""

    def submit(self, sequence: Sequence, listener: Callable[[], object], every_step: bool) -> None:
        """Queue a sequence; a ValueError if it can never fit, a RuntimeError once the thread died.

        Args:
            listener: called, in the batcher's thread and under its lock, when the sequence is
                finished; it must return at once and not raise.
            every_step: call it after every step that brought text, too.
        """
        with self.lock:
            if self.failure is not None:
                raise RuntimeError(self.failure)
            if sequence.finish_reason is not None:  # nothing was asked for
                listener()
                return
            self.scheduler.add(sequence)
            self._listeners[sequence] = listener
            if every_step:
                self._streamed.add(sequence)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="codellama-engine")
                self._thread.start()

    def cancel(self, sequences: Iterable[Sequence] | None = None) -> None:
        """End some sequences, or all; those that are finished are left as they are."""
        with self.lock:
            for sequence in list(self._listeners if sequences is None else sequences):
                if sequence in self._listeners:
                    sequence.cancel()
                    self._finish(sequence)

    def _work(self) -> None:
        """Run steps until nothing is left; if that itself fails, everyone hears of it."""
        try:
            while self._try_step():
                pass
        except BaseException as error:  # noqa: BLE001  as in a step
            _log.error("the engine has stopped: %s", where(error))
            with self.lock:
                self.failure = f"the engine has stopped: {type(error).__name__}: {error}"
                for sequence, listener in self._listeners.items():
                    sequence.fail(RuntimeError(self.failure))
                    listener()
                self._listeners.clear()

    def _try_step(self) -> bool:
        try:
            return self._step()
        except Exception as error:  # noqa: BLE001  whatever it is, its callers must hear of it
            with self.lock:
                failed, self._in_step = self._in_step or set(self._listeners), set()
                for sequence in failed:
                    self.scheduler.remove(sequence)  # also one that was cancelled meanwhile
                    self._fail(sequence, error)
            return True

    def _step(self) -> bool:
        """Run one step; False, and the thread is to end, where there is nothing to run."""
        with self.lock:
            running = list(self.scheduler.running)
        self._speculator.prepare(running)
        with self.lock:
            plan = self.scheduler.schedule()
            if not plan:
                self._thread = None
                return False
            drafts = [len(sequence.draft) for sequence, _ in plan]
            self._in_step = {sequence for sequence, _ in plan}
        begin = time.perf_counter()
        results = self._run(plan)
        duration_s = time.perf_counter() - begin
        with self.lock:
            self._in_step = set()
            for (sequence, n_tokens), result in zip(plan, results, strict=True):
                sequence.draft = []
                if sequence.finish_reason is not None:  # cancelled meanwhile
                    self.scheduler.remove(sequence)
                    continue
                try:
                    if isinstance(result, Exception):
                        raise result
                    self._accept(sequence, n_tokens, result)
                except Exception as error:  # noqa: BLE001  as in a step; a grammar may raise
                    self._fail(sequence, error)
            given = [[] if isinstance(result, Exception) else result for result in results]
            self._speculator.note(plan, drafts, given, duration_s)
        return True

    def _run(self, plan: list[tuple[Sequence, int]]) -> list[Chosen | Exception]:
        """A step's results; where it fails as a whole, each sequence's own."""
        try:
            return list(self._runner.run(plan))
        except Exception as error:  # noqa: BLE001  as in a step
            return [error] if len(plan) == 1 else [r for one in plan for r in self._run([one])]

    def _accept(self, sequence: Sequence, n_tokens: int, chosen: Chosen) -> None:
        n_before = len(sequence.tokens)
        n_chars = len(sequence.text)
        for token, logprob, top in chosen:
            sequence.accept(token, logprob, top)
            if sequence.finish_reason is not None:
                break
        # All but the last of the new tokens were guesses: their keys are cached already.
        n_guessed = max(0, len(sequence.tokens) - n_before - 1)
        self.scheduler.advance(sequence, n_tokens + n_guessed)
        if sequence.finish_reason is not None:
            self._finish(sequence)
        elif len(sequence.text) > n_chars and sequence in self._streamed:
            self._listeners[sequence]()

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        if sequence.finish_reason is None:
            sequence.fail(error)
            self._finish(sequence)

    def _finish(self, sequence: Sequence) -> None:
        if sequence not in self._in_step:
            self.scheduler.remove(sequence)
        self._streamed.discard(sequence)
        if (listener := self._listeners.pop(sequence, None)) is not None:
            listener()
