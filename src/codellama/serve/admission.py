"""Who may start: a bound on texts and tokens under way, and the newest request of a client."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from codellama.serve.replies import ApiError


class Admission:
    """Counts what is under way. The engine itself runs some of it and lets the rest wait."""

    def __init__(self, max_texts: int, max_tokens: int) -> None:
        self.max_texts, self.max_tokens = max_texts, max_tokens
        self.n_texts = self.n_tokens = 0
        self._newest: dict[str, Callable[[], None]] = {}

    @property
    def is_full(self) -> bool:
        """Whether not even one more text may start."""
        return self.n_texts >= self.max_texts

    def enter(
        self,
        n_texts: int,
        n_tokens: int,
        client: str | None,
        end: Callable[[ApiError], object],
    ) -> Callable[[], None]:
        """Count a request in and return what counts it out, which may be called again.

        Args:
            client: where given, an older request of it ends in favour of this one.
            end: called with the reason when a newer request takes the place.

        Raises:
            ApiError: it could never start (400), or not now (429).
        """
        for name, asked, most in (
            ("texts", n_texts, self.max_texts),
            ("tokens", n_tokens, self.max_tokens),
        ):
            if asked > most:
                raise ApiError(400, f"the request asks for {asked} {name}: expected at most {most}")
        if client in self._newest:
            self._newest[client]()
        if self.n_texts + n_texts > self.max_texts or self.n_tokens + n_tokens > self.max_tokens:
            refuse()
        self.n_texts += n_texts
        self.n_tokens += n_tokens
        is_in = True

        def leave() -> None:
            nonlocal is_in
            if is_in:
                self.n_texts -= n_texts
                self.n_tokens -= n_tokens
                is_in = False
                if client is not None and self._newest.get(client) is replace:
                    del self._newest[client]

        def replace() -> None:
            leave()
            end(ApiError(409, "a newer request of this client took its place", "superseded"))

        if client is not None:
            self._newest[client] = replace
        return leave


def refuse() -> NoReturn:
    """Refuse a request because of the load.

    Raises:
        ApiError: always.
    """
    raise ApiError(
        429, "the server is busy; try again", "rate_limit_error", headers={"retry-after": "1"}
    )
