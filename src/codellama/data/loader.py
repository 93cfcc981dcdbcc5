"""The loader: batches for training, computed ahead by worker processes, resumable exactly.

Its state is a small plain value, one LaneState for each sequence of the global batch, taken behind
the last batch that was handed out; what workers (see worker.py) computed beyond it is computed
again. A new process that loads the state continues with the batch that would have come next.

In: collections of documents with their shares (packing.py, mixture.py). Out: Batch, each field
[B, T].
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.util import Finalize
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from codellama.data.packing import LaneState, PackingSettings, Share, lanes_of_rank
from codellama.data.worker import Rows, steps, work
from codellama.tokenizer import Tokenizer


class Batch(NamedTuple):
    """What one rank trains on in one step; every tensor is [B, T]."""

    tokens: Tensor  # int64
    targets: Tensor  # int64
    loss_mask: Tensor  # bool
    document_ids: Tensor  # int64
    positions: Tensor  # int64
    loss_weights: Tensor  # float32; 0 where loss_mask is False

    def to(self, device: str) -> Batch:
        """The same batch on a device; from pinned memory this does not wait."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))

    def micro_batches(self, size: int) -> Iterator[Batch]:
        """Cut along B."""
        for begin in range(0, len(self.tokens), size):
            yield Batch(*(tensor[begin : begin + size] for tensor in self))


class Loader:
    """An endless iterator of one rank's batches.

    Args:
        open_mixture, open_tokenizer: called in every worker; must be picklable.
        n_lanes: sequences of the global batch.
        n_workers: processes that compute ahead; 0 computes in this one.
    """

    def __init__(
        self,
        open_mixture: Callable[[], Sequence[Share]],
        open_tokenizer: Callable[[], Tokenizer],
        settings: PackingSettings,
        n_lanes: int,
        rank: int = 0,
        world_size: int = 1,
        n_workers: int = 1,
    ) -> None:
        self._open = (open_mixture, open_tokenizer)
        self._settings = settings
        self.n_lanes = n_lanes
        self._own = list(lanes_of_rank(n_lanes, rank, world_size))
        self._n_workers = min(n_workers, len(self._own))
        self.states = [LaneState()] * n_lanes
        """Where all lanes stand behind the last batch; those of other ranks are as loaded."""
        self._workers: list[tuple[Any, Any]] = []
        # Also when the loader is never closed: at exit Python would send the workers a SIGTERM,
        # which they do not see, and wait for them.
        Finalize(self, _end, (self._workers,), exitpriority=10)
        self._rows: Iterator[Rows] | None = None
        self.stall_s = 0.0
        """Seconds that `next` spent waiting for workers since the first batch."""

    def state_dict(self) -> dict[str, Any]:
        """Where this rank's lanes stand, as plain lists; those of other ranks are as loaded."""
        return {"n_lanes": self.n_lanes, "lanes": [list(state) for state in self.states]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue behind the batch after which `state` was taken.

        Raises:
            ValueError: the state is of another global batch.
        """
        if state["n_lanes"] != self.n_lanes:
            raise ValueError(
                f"the loader state is of {state['n_lanes']} sequences a batch, "
                f"this run has {self.n_lanes}; keep batch_tokens / seq_len"
            )
        self.close()
        self.states = [
            LaneState(tuple(turns), tuple(tokens), offset)
            for turns, tokens, offset in state["lanes"]
        ]

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        is_first = self._rows is None
        if self._rows is None:
            self._rows = self._from_workers() if self._n_workers else self._inline()
        begin = time.perf_counter()
        rows = next(self._rows)
        if not is_first:  # the first one waits for the workers to start
            self.stall_s += time.perf_counter() - begin
        for lane in self._own:
            self.states[lane] = rows[lane][1]
        columns = zip(*(rows[lane][0] for lane in self._own), strict=True)
        return Batch(*(torch.from_numpy(np.stack(column)) for column in columns))

    def close(self) -> None:
        """End the workers."""
        _end(self._workers)
        self._rows = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _inline(self) -> Iterator[Rows]:
        return steps(self._open, self._settings, self._own, self.n_lanes, self.states)

    def _from_workers(self) -> Iterator[Rows]:
        """Start the workers, each with every n-th lane, and merge what they send."""
        context = multiprocessing.get_context("spawn")  # fork is not safe beside torch's threads
        # A worker inherits the blocked signals: Ctrl-C reaches the whole process group, and the
        # training loop, which then wants to finish its step, would find its workers dead.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            for worker in range(self._n_workers):
                receiver, sender = context.Pipe(duplex=False)
                lanes = self._own[worker :: self._n_workers]
                arguments = (sender, self._open, self._settings, lanes, self.n_lanes, self.states)
                process = context.Process(target=work, args=arguments, daemon=True)
                process.start()
                sender.close()  # so that the pipe ends when the worker does, whatever kills it
                self._workers.append((process, receiver))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        while True:
            rows: Rows = {}
            for process, receiver in self._workers:
                rows |= _receive(process, receiver)
            yield rows


def _end(workers: list[tuple[Any, Connection]]) -> None:
    for process, receiver in workers:
        process.kill()  # they hold nothing that could be left half-done
        receiver.close()
    for process, _ in workers:
        process.join()
    workers.clear()


def _receive(process: Any, receiver: Connection) -> Rows:
    """One message of a worker.

    Raises:
        ValueError, OSError: what the worker failed with.
        RuntimeError: the worker died.
    """
    try:
        message = receiver.recv()
    except (EOFError, OSError):  # OSError: in the middle of a message
        process.join()
        raise RuntimeError(f"a loader process ended with exit code {process.exitcode}") from None
    if isinstance(message, Exception):
        raise message
    return message
