"""What can be asked of a model, wherever it runs: the interface of Engine and Endpoint.

Prompts become ids here, together with the ids that end what follows them; where there is no
tokenizer, the server has one. How texts are run is up to the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from typing import Any

from codellama.engine.sampling import SamplingParams
from codellama.engine.sequence import Completion, Piece
from codellama.tokenizer.chat import Message
from codellama.tokenizer.chat import stop_ids as chat_stop_ids
from codellama.tokenizer.infilling import stop_ids as infilling_stop_ids

Prompt = str | Sequence[int]
Params = SamplingParams | Sequence[SamplingParams]
OnText = Callable[[int, str], None]
OnEnd = Callable[[int, list[Completion]], None]
Put = Callable[[int, Piece | BaseException], None]


@dataclass(frozen=True)
class Ask:
    """One text that is wanted."""

    prompt: Prompt | Sequence[Message]
    """Ids; texts and messages only where there is no tokenizer."""
    stop_ids: Sequence[int] = ()
    suffix: str | None = None
    """What stands behind the gap, where the prompt is a text."""
    echo: bool = False
    """Whether log-probabilities are to begin with those of the prompt; servers only."""
    params: SamplingParams = field(default_factory=SamplingParams)
    """With n = 1."""


class Generator:
    """Generates with one model; texts may be asked for from many threads."""

    tokenizer: Any
    """A Tokenizer; at an Endpoint None where it was given none."""

    def complete(
        self,
        prompts: Sequence[Prompt],
        params: Params | None = None,
        on_text: OnText | None = None,
        on_end: OnEnd | None = None,
    ) -> list[Completion]:
        """Continue prompts; with n > 1 each has n results, one after the other.

        Args:
            prompts: texts, which get a BOS, or ids, which are taken as they are.
            params: one for all, or one for each prompt.
            on_text: called with the number of the result and each new piece of its text.
            on_end: called with the number of a prompt and its results, when the last of them ends.

        Raises:
            ValueError: a prompt is empty or longer than the context, or a server refuses it.
            ConnectionError: no server answers.
        """
        if isinstance(prompts, str):  # it would be taken for a list of characters
            raise ValueError("expected a list of prompts, got one text")
        return self._generate(list(map(self._continuation, prompts)), params, on_text, on_end)

    def infill(
        self,
        gaps: Sequence[tuple[str, str]],
        params: Params | None = None,
        suffix_first: bool = False,
        on_text: OnText | None = None,
        on_end: OnEnd | None = None,
    ) -> list[Completion]:
        """Write what stands between each (prefix, suffix).

        Raises:
            ValueError: the model was not trained to infill, or a prompt is too long.
        """
        asks = [self._gap(prefix, suffix, suffix_first) for prefix, suffix in gaps]
        return self._generate(asks, params, on_text, on_end)

    def chat(
        self,
        dialogs: Sequence[Sequence[Message]],
        params: Params | None = None,
        on_text: OnText | None = None,
        on_end: OnEnd | None = None,
    ) -> list[Completion]:
        """Answer dialogs of {"role", "content"} messages that end with the user's.

        Raises:
            ValueError: roles out of order, a tag of the format in a message, or a long dialog.
        """
        tokenizer = self.tokenizer
        if tokenizer is None:
            return self._generate(list(map(Ask, dialogs)), params, on_text, on_end)
        stops = chat_stop_ids(tokenizer)
        asks = [Ask(tokenizer.encode_dialog(dialog), stops) for dialog in dialogs]
        return self._generate(asks, params, on_text, on_end)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[str]:
        """Continue one prompt and yield its text as it comes, never a broken character.

        Closing the iterator ends the generation.
        """
        return self._stream(self._continuation(prompt), params)

    def stream_infill(
        self,
        prefix: str,
        suffix: str,
        params: SamplingParams | None = None,
        suffix_first: bool = False,
    ) -> Iterator[str]:
        """As `stream`, for the text between a prefix and a suffix."""
        return self._stream(self._gap(prefix, suffix, suffix_first), params)

    def _write(self, asks: Sequence[Ask], every_step: bool, put: Put, stack: ExitStack) -> None:
        """Have some texts written.

        Args:
            every_step: in many pieces, as they come; otherwise each whole in one or two.
            put: called from any thread with a text's number and its next piece, or what ended it.
            stack: gets a callback that ends what still runs.
        """
        raise NotImplementedError

    def _run(self, asks: Sequence[Ask], every_step: bool) -> Iterator[tuple[int, Piece]]:
        """The pieces of some texts, each with its text's number; closing it ends them."""
        news: SimpleQueue[tuple[int, Piece | BaseException]] = SimpleQueue()
        running = set(range(len(asks)))
        with ExitStack() as stack:
            self._write(asks, every_step, lambda *item: news.put(item), stack)
            while running:
                number, item = news.get()
                if number not in running:  # cancelled when it had just ended
                    continue
                if isinstance(item, BaseException):
                    raise item
                if item.finish_reason is not None:
                    running.remove(number)
                yield number, item

    def _continuation(self, prompt: Prompt) -> Ask:
        if self.tokenizer is None:
            return Ask(prompt)
        if isinstance(prompt, str):
            prompt = self.tokenizer.encode(prompt, bos=True)
        return Ask(prompt, (self.tokenizer.eos_id,))

    def _gap(self, prefix: str, suffix: str, suffix_first: bool) -> Ask:
        if self.tokenizer is not None:
            ids = self.tokenizer.encode_infilling(prefix, suffix, suffix_first)
            return Ask(ids, infilling_stop_ids(self.tokenizer))
        if suffix_first:
            raise ValueError("suffix_first: an endpoint needs the model's tokenizer for it")
        return Ask(prefix, suffix=suffix)

    def _generate(
        self,
        asks: Sequence[Ask],
        params: Params | None,
        on_text: OnText | None = None,
        on_end: OnEnd | None = None,
    ) -> list[Completion]:
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(asks)
        if len(params) != len(asks):
            raise ValueError(f"{len(params)} sampling params for {len(asks)} prompts")
        if on_text and any(settings.best_of for settings in params):
            raise ValueError("best_of: which texts are given shows at the end only")
        texts = [
            (number, replace(ask, params=each))
            for number, (ask, settings) in enumerate(zip(asks, params, strict=True))
            for each in settings.split()
        ]
        parts: list[list[Piece]] = [[] for _ in texts]
        places: list[list[int]] = [[] for _ in asks]
        for place, (number, _) in enumerate(texts):
            places[number].append(place)
        n_left = [len(own) for own in places]
        results: dict[int, list[Completion]] = {}
        for place, piece in self._run([ask for _, ask in texts], on_text is not None):
            parts[place].append(piece)
            if on_text and piece.text:
                on_text(place, piece.text)
            number = texts[place][0]
            n_left[number] -= piece.finish_reason is not None
            if piece.finish_reason is not None and not n_left[number]:
                found = [_joined(texts[own][1], parts[own]) for own in places[number]]
                results[number] = self._chosen(asks[number], params[number], found)
                if on_end:
                    on_end(number, results[number])
        return [completion for number in range(len(asks)) for completion in results[number]]

    def _chosen(
        self, ask: Ask, params: SamplingParams, found: list[Completion]
    ) -> list[Completion]:
        """What a caller gets of the texts that were written for a prompt."""
        if params.best_of is not None:
            found = sorted(found, key=_mean_logprob, reverse=True)[: params.n]
            if not params.logprobs:
                found = [replace(completion, logprobs=None) for completion in found]
        if params.prompt_logprobs:
            scores = tuple(self.score([ask.prompt])[0])  # type: ignore[arg-type]
            found = [replace(completion, prompt_logprobs=scores) for completion in found]
        return found

    def score(self, prompts: Sequence[Prompt]) -> list[list[float]]:
        """Log-probabilities of given texts, one for each token after the first."""
        raise NotImplementedError

    def _stream(self, ask: Ask, params: SamplingParams | None) -> Iterator[str]:
        for _, piece in self._run([replace(ask, params=params or SamplingParams())], True):
            if piece.text:
                yield piece.text


def _joined(ask: Ask, pieces: Sequence[Piece]) -> Completion:
    wants, top = ask.params.logprobs, ask.params.top_logprobs
    return Completion(
        "".join(piece.text for piece in pieces),
        tuple(token for piece in pieces for token in piece.token_ids),
        tuple(p for piece in pieces for p in piece.logprobs) if wants else None,
        pieces[-1].finish_reason or "",
        0 if isinstance(ask.prompt, str) else len(ask.prompt),
        tuple(row for piece in pieces for row in piece.top_logprobs) if top else None,
    )


def _mean_logprob(completion: Completion) -> float:
    return sum(completion.logprobs or ()) / max(1, len(completion.token_ids))
