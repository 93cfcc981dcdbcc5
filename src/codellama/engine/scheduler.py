"""The scheduler: which tokens of which sequence run in the next step.

Plain Python over integers. Each step, running sequences get their next token, and a bounded number
of prompt tokens runs beside them, shared among the prompts, so that a long prompt stalls nobody.
Where blocks run out, the sequence that came last gives its own back and is computed again later;
the one that came first always goes on.

    add(job) ... schedule() -> [(job, n_tokens)] -> run them -> advance(job, n) ... remove(job)
"""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

from codellama.engine.blocks import BlockPool, extend_digests

STEP_TOKENS = 512  # of prompts: enough to use the matrix units, few enough to wait for
MAX_PROMPTS_AT_A_TIME = 8  # that share them


class Job:
    """A sequence as the scheduler sees it: its tokens, and where their keys and values are."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens
        """Everything known, prompt and generated; grows from outside, by one or more a step."""
        self.draft: list[int] = []
        """Guesses of what follows, to be checked in the next step."""
        self.blocks: list[int] = []
        self.n_cached = 0
        """Tokens from the beginning whose keys and values are in the blocks."""
        self.n_reused = 0
        """Those of them that another sequence had left there."""
        self.digests: list[bytes] = []
        self.n_published = 0
        self.state = "new"  # -> "waiting" <-> "running" -> "done"

    @property
    def n_pending(self) -> int:
        """Known tokens that are still to be run; one while decoding."""
        return len(self.tokens) - self.n_cached


JobT = TypeVar("JobT", bound=Job)


class Scheduler(Generic[JobT]):
    """Decides about jobs in order of arrival.

    Args:
        max_batch: jobs that run at a time.
        step_tokens: prompt tokens that run in one step.
    """

    def __init__(self, pool: BlockPool, max_batch: int, step_tokens: int = STEP_TOKENS) -> None:
        if max_batch < 1:
            raise ValueError(f"max_batch = {max_batch}: expected at least 1")
        if step_tokens < pool.block_tokens * MAX_PROMPTS_AT_A_TIME:
            least = pool.block_tokens * MAX_PROMPTS_AT_A_TIME
            raise ValueError(f"step_tokens = {step_tokens}: expected at least {least}")
        self.pool = pool
        self.running: list[JobT] = []
        """In order of arrival."""
        self.n_waiting = 0
        self.n_preempted = 0
        self._waiting: deque[JobT] = deque()  # those that were removed are dropped when met
        self._max_batch, self._step_tokens = max_batch, step_tokens
        self._computing: set[bytes] = set()  # blocks that running jobs will publish soon

    def add(self, job: JobT) -> None:
        """Queue a job behind the others.

        Raises:
            ValueError: it would not fit even alone.
        """
        capacity = self.pool.n_blocks * self.pool.block_tokens
        if len(job.tokens) > capacity:
            raise ValueError(f"a sequence of {len(job.tokens)} tokens; the cache holds {capacity}")
        job.state = "waiting"
        self._waiting.append(job)
        self.n_waiting += 1

    def remove(self, job: JobT) -> None:
        """Forget a job, whatever its state; its blocks are available at once."""
        if job.state == "waiting":
            self.n_waiting -= 1
        elif job.state == "running":
            self.running.remove(job)
            self._release(job)
        job.state = "done"

    def schedule(self) -> list[tuple[JobT, int]]:
        """The jobs that run now, in order of arrival, each with its number of next tokens.

        A job whose known tokens all run gets its draft checked too. Room for everything is
        allocated. Empty only when there is nothing to do.
        """
        self._admit()
        shares = self._shares()
        plan: list[tuple[JobT, int]] = []
        for job in list(self.running):
            if job.state != "running":  # it gave way to an earlier one
                continue
            n_tokens = shares.get(id(job), job.n_pending)
            if n_tokens == job.n_pending and not self._has_room_for_draft(job):
                job.draft = []
            n_drafted = len(job.draft) if n_tokens == job.n_pending else 0
            if n_tokens and self._make_room(job, job.n_cached + n_tokens + n_drafted):
                plan.append((job, n_tokens))
        return plan

    def advance(self, job: JobT, n_tokens: int) -> None:
        """Note that the next tokens of a job were run; full blocks become known to others."""
        job.n_cached += n_tokens
        n_full = job.n_cached // self.pool.block_tokens
        if n_full > job.n_published:
            extend_digests(job.digests, job.tokens, self.pool.block_tokens)
            for number in range(job.n_published, n_full):
                self.pool.publish(job.blocks[number], job.digests[number])
                self._computing.discard(job.digests[number])
            job.n_published = n_full

    def _admit(self) -> None:
        """Move waiting jobs into the batch while there is room."""
        n_prompts = sum(job.n_pending > 1 for job in self.running)
        n_reserved = len(self.running) + sum(map(self._n_missing, self.running))
        passed: list[JobT] = []
        while self._waiting and len(self.running) < self._max_batch:
            if n_prompts >= MAX_PROMPTS_AT_A_TIME or len(passed) > self._max_batch:
                break
            job = self._waiting.popleft()
            if job.state != "waiting":
                continue
            extend_digests(job.digests, job.tokens, self.pool.block_tokens)
            if self.running and self._is_being_computed(job):  # in a moment it can be shared
                passed.append(job)
                continue
            self._share(job)
            if self.running and self._n_missing(job) + n_reserved > self.pool.n_available:
                self._release(job)
                passed.append(job)
                break  # those behind would otherwise overtake a large one for ever
            n_reserved += self._n_missing(job) + 1
            n_prompts += job.n_pending > 1
            job.state = "running"
            self.n_waiting -= 1
            self.running.append(job)
        self._waiting.extendleft(reversed(passed))

    def _share(self, job: JobT) -> None:
        """Give a job the known blocks of its beginning."""
        # The last token always runs: its output is what is wanted.
        n_usable = (len(job.tokens) - 1) // self.pool.block_tokens
        job.blocks = self.pool.share(job.digests[:n_usable])
        job.n_published = len(job.blocks)
        job.n_cached = job.n_reused = len(job.blocks) * self.pool.block_tokens
        self._computing.update(job.digests[job.n_published : n_usable])

    def _is_being_computed(self, job: JobT) -> bool:
        """Whether a running job is about to publish the next block that this one needs."""
        n_usable = (len(job.tokens) - 1) // self.pool.block_tokens
        if not self._computing.intersection(job.digests[:n_usable]):
            return False
        blocks = self.pool.share(job.digests[:n_usable])
        self.pool.release(blocks)
        return len(blocks) < n_usable and job.digests[len(blocks)] in self._computing

    def _shares(self) -> dict[int, int]:
        """Tokens of this step for every job in its prompt: equal, but none more than it needs."""
        prompts = sorted((job for job in self.running if job.n_pending > 1), key=_n_pending)
        shares: dict[int, int] = {}
        budget = self._step_tokens
        for n_done, job in enumerate(prompts):
            n_tokens = min(job.n_pending, budget // (len(prompts) - n_done))
            if n_tokens < job.n_pending:  # parts that begin with a block have fewer lengths
                n_tokens -= n_tokens % self.pool.block_tokens
            shares[id(job)] = n_tokens
            budget -= n_tokens
        return shares

    def _has_room_for_draft(self, job: JobT) -> bool:
        """Whether guesses fit without taking anybody's blocks."""
        n_tokens = len(job.tokens) + len(job.draft)
        n_blocks = self._n_blocks(n_tokens) - len(job.blocks)
        return n_blocks + len(self.running) <= self.pool.n_available

    def _make_room(self, job: JobT, n_tokens: int) -> bool:
        """Allocate blocks for the first tokens of a job; False if it had to give way itself."""
        while len(job.blocks) < self._n_blocks(n_tokens):
            if self.pool.n_available:
                job.blocks.append(self.pool.allocate())
                continue
            last = self.running[-1]
            self._preempt(last)
            if last is job:
                return False
        return True

    def _preempt(self, job: JobT) -> None:
        """Send a running job back to the head of the queue, without blocks."""
        self.running.remove(job)
        self._release(job)
        job.draft = []
        job.state = "waiting"
        self._waiting.appendleft(job)
        self.n_waiting += 1
        self.n_preempted += 1

    def _release(self, job: JobT) -> None:
        self._computing.difference_update(job.digests[job.n_published :])
        self.pool.release(job.blocks)
        job.blocks, job.n_cached, job.n_published = [], 0, 0

    def _n_missing(self, job: JobT) -> int:
        """Blocks that a job's known tokens need beyond those it has."""
        return max(0, self._n_blocks(len(job.tokens)) - len(job.blocks))

    def _n_blocks(self, n_tokens: int) -> int:
        return -(-n_tokens // self.pool.block_tokens)


def _n_pending(job: Job) -> int:
    return job.n_pending
