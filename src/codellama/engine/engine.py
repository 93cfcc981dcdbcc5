"""The Engine: complete, infill, chat, stream and score with a model in this process.

Prompts enter as text or as ids; sequences join the running batch as soon as there is room and
leave it when they end, so nobody waits for the slowest. Results do not depend on who else is in
the batch. It may be called from many threads; they take turns step by step.
"""

from __future__ import annotations

import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from codellama.engine.runner import Runner
from codellama.engine.sampling import SamplingParams
from codellama.engine.sequence import Completion
from codellama.engine.sequence import Sequence as Running
from codellama.model.transformer import Transformer
from codellama.tokenizer import Tokenizer
from codellama.tokenizer.chat import Message
from codellama.tokenizer.chat import stop_ids as chat_stop_ids
from codellama.weights import load

Prompt = str | Sequence[int]
Params = SamplingParams | Sequence[SamplingParams]
PREFILL_TOKENS = 4096  # prompts that run in one pass; more would only make the others wait
SHIPPED_MODEL = Path(__file__).parent.parent / "pretrained"


class Engine:
    """Generates with one model.

    Args:
        model: a checkpoint in any format that loads, or None for the model in this package.
        dtype: "bfloat16", "float16" or "float32".
        max_batch: sequences that run at a time; more wait.

    Raises:
        ValueError: the checkpoint cannot be read.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        device: str = "cpu",
        dtype: str = "bfloat16",
        max_batch: int = 64,
    ) -> None:
        loaded, tokenizer = load(model or SHIPPED_MODEL, device=device, dtype=dtype)
        self._start(loaded, tokenizer, max_batch)

    @classmethod
    def of(cls, model: Transformer, tokenizer: Tokenizer, max_batch: int = 64) -> Engine:
        """An engine around a model that is already in memory."""
        engine = cls.__new__(cls)
        engine._start(model, tokenizer, max_batch)
        return engine

    def _start(self, model: Transformer, tokenizer: Tokenizer, max_batch: int) -> None:
        self.tokenizer = tokenizer
        self.max_context = model.config.max_position_embeddings
        self._runner = Runner(model)
        self._waiting: deque[Running] = deque()
        self._max_batch = max_batch
        self._lock = threading.Lock()

    def complete(
        self,
        prompts: Sequence[Prompt],
        params: Params | None = None,
        on_text: Callable[[int, str], None] | None = None,
    ) -> list[Completion]:
        """Continue prompts; with n > 1 each has n results, one after the other.

        Args:
            prompts: texts, which get a BOS, or ids, which are taken as they are.
            params: one for all, or one for each prompt.
            on_text: called with the number of the result and each new piece of its text.

        Raises:
            ValueError: a prompt is empty or longer than the context.
        """
        prompts = _listed(prompts)
        ids = [self.tokenizer.encode(p, bos=True) if isinstance(p, str) else p for p in prompts]
        return self._generate(ids, params, (self.tokenizer.eos_id,), on_text)

    def infill(
        self,
        gaps: Sequence[tuple[str, str]],
        params: Params | None = None,
        suffix_first: bool = False,
        on_text: Callable[[int, str], None] | None = None,
    ) -> list[Completion]:
        """Write what stands between each (prefix, suffix).

        Raises:
            ValueError: the model was not trained to infill, or a prompt is too long.
        """
        ids = [self.tokenizer.encode_infilling(p, s, suffix_first) for p, s in gaps]
        return self._generate(ids, params, self._infilling_stops(), on_text)

    def chat(
        self,
        dialogs: Sequence[Sequence[Message]],
        params: Params | None = None,
        on_text: Callable[[int, str], None] | None = None,
    ) -> list[Completion]:
        """Answer dialogs of {"role", "content"} messages that end with the user's.

        Raises:
            ValueError: roles out of order, a tag of the format in a message, or a long dialog.
        """
        ids = [self.tokenizer.encode_dialog(dialog) for dialog in dialogs]
        return self._generate(ids, params, chat_stop_ids(self.tokenizer), on_text)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[str]:
        """Continue one prompt and yield its text as it comes, never a broken character.

        Closing the iterator ends the generation.
        """
        ids = self.tokenizer.encode(prompt, bos=True) if isinstance(prompt, str) else prompt
        yield from self._stream(ids, params, (self.tokenizer.eos_id,))

    def stream_infill(
        self,
        prefix: str,
        suffix: str,
        params: SamplingParams | None = None,
        suffix_first: bool = False,
    ) -> Iterator[str]:
        """As `stream`, for the text between a prefix and a suffix."""
        ids = self.tokenizer.encode_infilling(prefix, suffix, suffix_first)
        yield from self._stream(ids, params, self._infilling_stops())

    def stream_chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None
    ) -> Iterator[str]:
        """As `stream`, for the answer to a dialog."""
        ids = self.tokenizer.encode_dialog(messages)
        yield from self._stream(ids, params, chat_stop_ids(self.tokenizer))

    def score(self, prompts: Sequence[Prompt]) -> list[list[float]]:
        """Log-probabilities (natural) of given texts, one for each token after the first.

        Raises:
            ValueError: a text is longer than the context.
        """
        results = []
        for prompt in _listed(prompts):
            ids = self.tokenizer.encode(prompt, bos=True) if isinstance(prompt, str) else prompt
            if len(ids) > self.max_context:
                raise ValueError(
                    f"the text has {len(ids)} tokens, the model's context {self.max_context}"
                )
            with self._lock:
                results.append(self._runner.score(list(ids)) if len(ids) > 1 else [])
        return results

    def cancel(self) -> None:
        """End everything that runs or waits; callers get what there is, as `cancelled`."""
        with self._lock:
            for sequence in [*self._runner.sequences, *self._waiting]:
                sequence.cancel()

    def _infilling_stops(self) -> tuple[int, ...]:
        eot = self.tokenizer.eot_id
        return (self.tokenizer.eos_id,) if eot is None else (self.tokenizer.eos_id, eot)

    def _generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: Params | None,
        stops: tuple[int, ...],
        on_text: Callable[[int, str], None] | None,
    ) -> list[Completion]:
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            raise ValueError(f"{len(params)} sampling params for {len(prompts)} prompts")
        sequences: list[Running] = []
        for prompt, settings in zip(prompts, params, strict=True):
            sequences += self._sequences(prompt, settings, stops)
        self._submit(sequences)
        seen = [0] * len(sequences)
        try:
            while self._step(sequences):
                if on_text:
                    _report(sequences, seen, on_text)
        finally:
            self._withdraw(sequences)
        if on_text:
            _report(sequences, seen, on_text)
        return [sequence.completion() for sequence in sequences]

    def _stream(
        self, prompt: Sequence[int], params: SamplingParams | None, stops: tuple[int, ...]
    ) -> Iterator[str]:
        sequences = self._sequences(prompt, params or SamplingParams(), stops)
        if len(sequences) != 1:
            raise ValueError("n > 1 cannot be streamed; call once for each")
        self._submit(sequences)
        n_seen = 0
        try:
            is_running = True
            while is_running:
                is_running = self._step(sequences)
                if len(sequences[0].text) > n_seen:
                    yield sequences[0].text[n_seen:]
                    n_seen = len(sequences[0].text)
        finally:
            self._withdraw(sequences)

    def _sequences(
        self, prompt: Sequence[int], params: SamplingParams, stops: tuple[int, ...]
    ) -> list[Running]:
        """The n sequences of a prompt; each has a seed of its own."""
        first = secrets.randbits(48) if params.seed is None else params.seed
        return [
            Running(self.tokenizer, prompt, params, stops, self.max_context, first + i)
            for i in range(params.n)
        ]

    def _submit(self, sequences: list[Running]) -> None:
        with self._lock:
            self._waiting += [s for s in sequences if s.finish_reason is None]

    def _withdraw(self, sequences: list[Running]) -> None:
        """Take a caller's sequences out, finished or not; their cache rows are free at once."""
        mine = set(map(id, sequences))
        with self._lock:
            self._waiting = deque(s for s in self._waiting if id(s) not in mine)
            for row in reversed(range(len(self._runner.sequences))):
                if id(self._runner.sequences[row]) in mine:
                    self._runner.remove(row)
        for sequence in sequences:
            sequence.cancel()

    def _step(self, sequences: list[Running]) -> bool:
        """Run one step for everybody; whether the caller's sequences still run."""
        with self._lock:
            if all(s.finish_reason is not None for s in sequences):
                return False
            runner = self._runner
            self._drop_finished()
            if joining := self._next_joining():
                for sequence, chosen in zip(joining, runner.prefill(joining), strict=True):
                    sequence.accept(*chosen)
            elif runner.sequences:
                for sequence, chosen in zip(runner.sequences, runner.decode(), strict=True):
                    sequence.accept(*chosen)
            self._drop_finished()
        return any(s.finish_reason is None for s in sequences)

    def _next_joining(self) -> list[Running]:
        """Waiting sequences whose prompts run together now: while there are rows and room."""
        joining: list[Running] = []
        n_tokens = 0
        n_free = self._max_batch - len(self._runner.sequences)
        while self._waiting and len(joining) < n_free:
            if self._waiting[0].finish_reason is None:
                n_tokens += len(self._waiting[0].prompt)
                if joining and n_tokens > PREFILL_TOKENS:
                    break
                joining.append(self._waiting[0])
            self._waiting.popleft()
        return joining

    def _drop_finished(self) -> None:
        for row in reversed(range(len(self._runner.sequences))):
            if self._runner.sequences[row].finish_reason is not None:
                self._runner.remove(row)


def _listed(prompts: Sequence[Prompt]) -> list[Prompt]:
    """A single text would be taken for a list of characters."""
    if isinstance(prompts, str):
        raise ValueError("expected a list of prompts, got one text")
    return list(prompts)


def _report(sequences: list[Running], seen: list[int], on_text: Callable[[int, str], None]) -> None:
    """Tell a caller what is new since the last step."""
    for number, sequence in enumerate(sequences):
        if len(sequence.text) > seen[number]:
            on_text(number, sequence.text[seen[number] :])
            seen[number] = len(sequence.text)
