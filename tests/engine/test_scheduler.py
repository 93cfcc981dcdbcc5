"""The scheduler over random schedules, with a cache that remembers what stands where."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pool_check import check

from codellama.engine.blocks import BlockPool
from codellama.engine.scheduler import MAX_PROMPTS_AT_A_TIME, Job, Scheduler

BLOCK = 4
STEP_TOKENS = BLOCK * MAX_PROMPTS_AT_A_TIME


class Request(Job):
    """A job that wants a number of tokens; which ones follow is a function of those before."""

    def __init__(self, prompt, n_wanted):
        super().__init__(list(prompt))
        self.n_wanted = n_wanted
        self.n_prompt = len(prompt)

    @property
    def is_done(self):
        return len(self.tokens) - self.n_prompt >= self.n_wanted


def following(tokens):
    return hash(tuple(tokens)) % 3


class Machine:
    """Runs what a scheduler asks for and checks that the keys of all earlier tokens are there."""

    def __init__(self, n_blocks, max_batch, draft=None):
        self.pool = BlockPool(n_blocks, BLOCK)
        self.scheduler = Scheduler(self.pool, max_batch, STEP_TOKENS)
        self.content = {}
        self.max_batch = max_batch
        self.n_run = 0
        self.draft = draft

    def step(self):
        for job in self.scheduler.running:
            if self.draft and job.n_pending == 1:
                job.draft = self.draft(job)
        plan = self.scheduler.schedule()
        jobs = [job for job, _ in plan]
        assert len(jobs) == len(set(map(id, jobs))) <= self.max_batch
        assert sum(n for _, n in plan if n > 1) <= STEP_TOKENS
        order = [id(job) for job in self.scheduler.running]
        assert [id(job) for job in jobs] == [i for i in order if i in set(map(id, jobs))]
        check(self.pool, [job.blocks for job in self.scheduler.running])
        for job, n_tokens in plan:
            self.run(job, n_tokens)
        return plan

    def run(self, job, n_tokens):
        """Write and read as a forward pass does: everything at once, guesses included."""
        assert 1 <= n_tokens <= job.n_pending
        is_last = n_tokens == job.n_pending
        tokens = job.tokens + (job.draft if is_last else [])
        end = job.n_cached + n_tokens + (len(job.draft) if is_last else 0)
        for position in range(job.n_cached, end):
            slot = job.blocks[position // BLOCK], position % BLOCK
            self.content[slot] = tuple(tokens[: position + 1])
        for position in range(end):
            slot = job.blocks[position // BLOCK], position % BLOCK
            assert self.content[slot] == tuple(tokens[: position + 1])
        self.n_run += n_tokens
        if not is_last:
            self.scheduler.advance(job, n_tokens)
            return
        n_right = 0
        while not job.is_done:
            token = following(job.tokens)
            job.tokens.append(token)
            if job.is_done or n_right >= len(job.draft) or job.draft[n_right] != token:
                break
            n_right += 1
        job.draft = []
        self.scheduler.advance(job, n_tokens + n_right)
        if job.is_done:
            self.scheduler.remove(job)


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_random_schedules(data):
    """Arrivals, cancellations, guesses and too few blocks: all get what they would alone."""
    n_blocks = data.draw(st.integers(8, 30))

    def draft(job):
        tokens = list(job.tokens)
        for _ in range(data.draw(st.integers(0, 5))):
            tokens.append(following(tokens))
        guesses = tokens[len(job.tokens) :]
        if guesses and data.draw(st.booleans()):
            guesses[-1] += 1
        return guesses

    machine = Machine(n_blocks, data.draw(st.integers(1, 6)), draft)
    prompts = st.lists(st.integers(0, 1), min_size=1, max_size=20)
    requests: list[Request] = []
    for _ in range(data.draw(st.integers(5, 25))):
        if data.draw(st.booleans()):
            request = Request(data.draw(prompts), data.draw(st.integers(1, 12)))
            requests.append(request)
            machine.scheduler.add(request)
        if requests and data.draw(st.integers(0, 9)) == 0:
            machine.scheduler.remove(data.draw(st.sampled_from(requests)))
        machine.step()
    for _ in range(2000):
        if not machine.step():
            break
    assert machine.scheduler.running == []
    assert machine.scheduler.n_waiting == 0
    assert machine.pool.n_used == 0
    for request in requests:
        assert request.state == "done"
        assert request.blocks == []
        for n in range(request.n_prompt, len(request.tokens)):
            assert request.tokens[n] == following(request.tokens[:n])


def test_a_long_prompt_stalls_nobody():
    machine = Machine(100, 4)
    long = Request([1] * 300, 1)
    machine.scheduler.add(long)
    machine.step()
    short = Request([2] * 10, 3)
    machine.scheduler.add(short)
    for _ in range(3):
        machine.step()
    assert short.is_done
    assert not long.is_done
    assert long.n_cached > 3 * STEP_TOKENS // 2  # and gets everything that is left


def test_the_first_to_come_always_goes_on():
    machine = Machine(8, 4)
    requests = [Request([n] * 4, 27) for n in range(4)]  # each alone needs 8 blocks
    for request in requests:
        machine.scheduler.add(request)
    ends = []
    while machine.step():
        ends += [n for n, request in enumerate(requests) if request.is_done and n not in ends]
    assert ends == [0, 1, 2, 3]
    assert machine.scheduler.n_preempted > 0


def test_samples_of_one_prompt_run_it_once():
    machine = Machine(100, 32)
    prompt = list(range(33))
    requests = [Request(prompt, 2) for _ in range(20)]
    for request in requests:
        machine.scheduler.add(request)
    while machine.step():
        pass
    # The first runs all 33 tokens, the others the one behind the last full block; then one each.
    assert machine.n_run == 33 + 19 + 20
    assert all(request.is_done for request in requests)


def test_one_more_keystroke_reuses_all_but_the_tail():
    machine = Machine(100, 4)
    machine.scheduler.add(Request(list(range(64)), 1))
    while machine.step():
        pass
    machine.n_run = 0
    typed = Request([*range(62), 99, 100, 101], 1)
    machine.scheduler.add(typed)
    while machine.step():
        pass
    assert typed.n_reused == 60
    assert machine.n_run == 5


def test_a_large_job_is_not_overtaken_for_ever():
    machine = Machine(10, 8)
    machine.scheduler.add(Request([0] * 20, 16))
    machine.step()
    large = Request([1] * 38, 1)
    machine.scheduler.add(large)
    late = [Request([2] * 4, 1) for _ in range(50)]
    for request in late:
        machine.scheduler.add(request)
    while not large.is_done:
        assert machine.step()
    assert not any(request.is_done for request in late)


def test_ten_thousand_queued_and_cancelled():
    machine = Machine(50, 8)
    requests = [Request([n % 7, n], 2) for n in range(10_000)]
    for request in requests:
        machine.scheduler.add(request)
    machine.step()
    for request in requests[:-10]:
        machine.scheduler.remove(request)
    assert machine.scheduler.n_waiting == 10
    while machine.step():
        pass
    assert [request.is_done for request in requests[-10:]] == [True] * 10
    assert machine.pool.n_used == 0


def test_what_cannot_fit_is_refused():
    machine = Machine(4, 1)
    with pytest.raises(ValueError, match=r"17 tokens.*holds 16"):
        machine.scheduler.add(Request([0] * 17, 1))
    with pytest.raises(ValueError, match="step_tokens"):
        Scheduler(machine.pool, 1, 4)
    with pytest.raises(ValueError, match="max_batch"):
        Scheduler(machine.pool, 0)
