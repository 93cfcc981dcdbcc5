"""The Engine: complete, infill, chat, stream and score with a model in this process.

Prompts enter as text or as ids and join the running batch at once; each leaves it when it ends, so
nobody waits for the slowest. It may be called from many threads, and from an event loop through
`pieces`. Results do not depend on who else is in the batch, beyond the rounding
of matrix products of other sizes: in float32 the tokens are the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch

from codellama.engine.batcher import Batcher
from codellama.engine.blocks import BLOCK_TOKENS, BlockPool
from codellama.engine.cache import PagedCache, available_bytes
from codellama.engine.generator import Ask, Generator, Prompt, Put
from codellama.engine.native import gather
from codellama.engine.runner import Chosen, Runner
from codellama.engine.sampling import SamplingParams
from codellama.engine.scheduler import STEP_TOKENS, Scheduler
from codellama.engine.sequence import Piece
from codellama.engine.sequence import Sequence as Running
from codellama.engine.speculate import DraftModel, Speculator
from codellama.model.source import DTYPES
from codellama.model.transformer import Transformer
from codellama.tokenizer import Tokenizer
from codellama.weights import load

PIECE_S = 0.001  # between two pieces, for each text that runs; one takes the loop 0.1 ms
SHIPPED_MODEL = Path(__file__).parent.parent / "pretrained"
CACHE_DTYPES = {**DTYPES, "int8": torch.int8}


class Options(TypedDict, total=False):
    """What an engine may be told beside its model."""

    max_batch: int
    """Sequences that run at a time; more wait. 64."""
    step_tokens: int
    """Prompt tokens that run in one step, so that a long prompt stalls nobody. 512."""
    cache_tokens: int
    """Positions that all sequences together may keep; as many as memory allows, up to the whole
    context for each. Where they run out, the sequence that came last is computed again later."""
    cache_dtype: str
    """What keys and values are kept in: the model's type by default, or "int8"."""
    max_guesses: int
    """Tokens guessed ahead from the text or by the draft model; 0 turns guessing off. 12."""
    native: bool
    """Whether few tokens at a time run through the compiled step, where there is one. True."""
    draft: Transformer
    """A small model of the same vocabulary that guesses instead of the text."""


class Engine(Generator):
    """Generates with one model.

    Args:
        model: a checkpoint in any format that loads, or None for the model in this package.
        dtype: "bfloat16", "float16", "float32" or "int8".
        options: see `Options`.

    Raises:
        ValueError: the checkpoint cannot be read, or an option is out of range.
    """

    tokenizer: Tokenizer

    def __init__(
        self,
        model: str | Path | None = None,
        device: str = "cpu",
        dtype: str = "bfloat16",
        **options: Unpack[Options],
    ) -> None:
        loaded, tokenizer = load(model or SHIPPED_MODEL, device=device, dtype=dtype)
        gather(loaded)
        self._start(loaded, tokenizer, options)

    @classmethod
    def of(cls, model: Transformer, tokenizer: Tokenizer, **options: Unpack[Options]) -> Engine:
        """An engine around a model that is already in memory."""
        engine = cls.__new__(cls)
        engine._start(model, tokenizer, options)
        return engine

    def _start(self, model: Transformer, tokenizer: Tokenizer, options: Options) -> None:
        self.tokenizer = tokenizer
        context = model.config.max_position_embeddings
        max_batch, name = options.get("max_batch", 64), options.get("cache_dtype")
        if name is not None and name not in CACHE_DTYPES:
            raise ValueError(f"cache_dtype {name!r}: expected one of {', '.join(CACHE_DTYPES)}")
        weight = model.model.embed_tokens.weight
        dtype = CACHE_DTYPES[name] if name else weight.dtype
        n_tokens = options.get("cache_tokens")
        if n_tokens is None:
            per_token = PagedCache.bytes_per_token(model.config, dtype)
            n_tokens = min(max_batch * context, available_bytes(weight.device) // per_token)
        n_blocks = max(1, -(-n_tokens // BLOCK_TOKENS))
        self.max_context = min(context, n_blocks * BLOCK_TOKENS)
        self._runner = Runner(model, n_blocks, BLOCK_TOKENS, dtype, options.get("native", True))
        draft = options.get("draft")
        guessing = Speculator(
            options.get("max_guesses", 12),
            None if draft is None else DraftModel(draft, model, n_blocks, BLOCK_TOKENS),
        )
        self._blocks = BlockPool(n_blocks)
        self._scheduler: Scheduler[Running] = Scheduler(
            self._blocks, max_batch, options.get("step_tokens", STEP_TOKENS)
        )
        self._batcher = Batcher(self._runner, self._scheduler, guessing)

    def score(self, prompts: Sequence[Prompt]) -> list[list[float]]:
        """Log-probabilities (natural) of given texts, one for each token after the first.

        Raises:
            ValueError: a text is longer than the context.
        """
        texts = (self.tokenizer.encode(p, bos=True) if isinstance(p, str) else p for p in prompts)
        return [[logprob for _, logprob, _ in self.rank(ids)] for ids in texts]

    def rank(self, ids: Sequence[int], n_top: int = 0) -> Chosen:
        """Each id after the first, with its log-probability and those of the most likely ids.

        Raises:
            ValueError: as `score`.
        """
        if len(ids) > self.max_context:
            raise ValueError(
                f"the text has {len(ids)} tokens, the model's context {self.max_context}"
            )
        self._check_ids(ids)
        return self._runner.score(list(ids), n_top) if len(ids) > 1 else []

    async def pieces(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        stop_ids: Sequence[int],
        whole: bool = False,
    ) -> AsyncIterator[Piece]:
        """Continue ids within an event loop; closing or cancelling it ends the generation.

        Args:
            whole: in two pieces, the first and all others, which costs the loop less.

        Raises:
            ValueError: the prompt is empty or longer than the context.
            RuntimeError: the engine has stopped, see `failure`.
        """
        loop = asyncio.get_running_loop()
        news: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        ask = Ask(prompt, stop_ids, params=params)
        # Compiling a grammar may take long enough for others in the loop to notice.
        is_slow = params.has_grammar
        sequence = await asyncio.to_thread(self._sequence, ask) if is_slow else self._sequence(ask)
        is_told, is_done, due = False, False, 0.0

        def tell() -> None:  # under the batcher's lock, for which the loop must not wait
            nonlocal is_told, due
            now = loop.time()
            if (is_told or now < due) and sequence.finish_reason is None:
                return  # it comes with the next piece
            is_told, due = True, now + PIECE_S * len(self._scheduler.running)
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits any more
                loop.call_soon_threadsafe(news.put_nowait, sequence.error or sequence.read())

        self._batcher.submit(sequence, tell, True)
        try:
            while not is_done:
                piece = await news.get()
                if isinstance(piece, Exception):
                    raise piece
                is_told, is_done = whole, piece.finish_reason is not None
                yield piece
        finally:
            if not is_done:
                self._batcher.cancel([sequence])

    @property
    def cache_use(self) -> float:
        """Share of the cache that what runs now holds, in [0, 1]."""
        return self._blocks.n_used / self._blocks.n_blocks

    @property
    def failure(self) -> str | None:
        """Why nothing can run any more; None while all is well."""
        return self._batcher.failure

    def cancel(self) -> None:
        """End everything that runs or waits; callers get what there is, as `cancelled`."""
        self._batcher.cancel()

    def _write(self, asks: Sequence[Ask], every_step: bool, put: Put, stack: ExitStack) -> None:
        sequences = list(map(self._sequence, asks))
        stack.callback(self._batcher.cancel, sequences)

        def tell(number: int, sequence: Running) -> None:
            put(number, sequence.error or sequence.read())

        for number, sequence in enumerate(sequences):
            self._batcher.submit(sequence, functools.partial(tell, number, sequence), every_step)

    def _sequence(self, ask: Ask) -> Running:
        prompt: Any = ask.prompt
        params = ask.params
        if params.n != 1 or params.best_of is not None:
            raise ValueError("n > 1 and best_of come from `complete`, `infill` and `chat` only")
        self._check_ids([*prompt, *(token for token, _ in params.logit_bias)])
        matcher = None
        if params.has_grammar:
            from codellama.engine.grammar import matcher_of

            matcher = matcher_of(self.tokenizer, params)
        seed = secrets.randbits(48) if params.seed is None else params.seed
        return Running(
            self.tokenizer, prompt, params, ask.stop_ids, self.max_context, seed, matcher
        )

    def _check_ids(self, ids: Sequence[int]) -> None:
        """Others would read memory beyond the embedding's end."""
        n_ids = self._runner.model.config.vocab_size
        if ids and (min(ids) < 0 or max(ids) >= n_ids):
            wrong = next(token for token in ids if not 0 <= token < n_ids)
            raise ValueError(f"token id {wrong}: expected one in [0, {n_ids - 1}]")
