"""What the server counts, in Prometheus' format."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The counters of one server; names begin with `codellama_`."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"codellama_{name}", text, labels, registry=registry)

        self.requests = counter("requests", "Replies by path and status.", "path", "status")
        self.cancelled = counter("cancelled", "Requests that ended before their last token.")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts.")
        self.cached_tokens = counter("cached_prompt_tokens", "Of those, found in the cache.")
        self.tokens = counter("generated_tokens", "Tokens generated.")
        self.first_token = Histogram(
            "codellama_time_to_first_token_seconds",
            "From a request to its first piece of text.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.rate = Histogram(
            "codellama_tokens_per_second",
            "Of each text, behind its first piece.",
            buckets=(1, 5, 10, 20, 50, 100, 200, 500, 1000, 2000),
            registry=registry,
        )
        self.running = Gauge("codellama_running", "Texts being written.", registry=registry)
        self.waiting = Gauge("codellama_waiting", "Texts not begun yet.", registry=registry)

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Add a value that is asked for when somebody looks."""
        Gauge(f"codellama_{name}", text, registry=self.registry).set_function(value)

    def text(self) -> bytes:
        """All of it."""
        return generate_latest(self.registry)
