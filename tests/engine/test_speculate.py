"""When guessing pays and when it rests, on a clock of our own."""

from codellama.engine.speculate import Speculator


class Text:
    """A sequence as the speculator sees it."""

    n_pending, n_left, changes_logits = 1, 10_000, False

    def __init__(self, tokens):
        self.tokens, self.draft, self.guesser = tokens, [], None


def test_guessing_rests_where_it_costs_time():
    """Guesses that are always wrong and cost a third more may lose 3% of the time at most."""
    text, speculator = Text([1, 2, 3] * 5), Speculator(12)
    spent = plain = 0.0
    for step in range(3000):
        speculator.prepare([text])
        n_guessed, text.draft = len(text.draft), []
        duration = 1.0 + (1 / 3 if n_guessed else 0)
        text.tokens += [100 + step] if step % 3 == 0 else [1, 2, 3]
        speculator.note([(text, 1)], [n_guessed], [[(0, 0.0, ())]], duration)
        spent, plain = spent + duration, plain + 1.0
    assert speculator.n_guessed > 10  # it tries again from time to time
    assert spent < 1.03 * plain


def test_guessing_goes_on_where_it_saves_time():
    text, speculator = Text([1, 2, 3, 4, 5, 6, 7] * 3), Speculator(8)
    n_steps, n_before = 0, len(text.tokens)
    while len(text.tokens) < 1000:
        speculator.prepare([text])
        n_guessed, text.draft = len(text.draft), []
        start = len(text.tokens) % 7
        text.tokens += ([1, 2, 3, 4, 5, 6, 7] * 3)[start : start + n_guessed + 1]
        speculator.note([(text, 1)], [n_guessed], [[(0, 0.0, ())] * (n_guessed + 1)], 1.3)
        n_steps += 1
    assert (len(text.tokens) - n_before) / n_steps > 7
