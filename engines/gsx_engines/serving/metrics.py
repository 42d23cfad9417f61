"""Counters, gauges and histograms of a server, as Prometheus reads them."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from gsx_engines.serving.request import Finished
from gsx_engines.serving.scheduler import Scheduler

# In seconds: from a token of a small model to a long answer of a large one.
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 180)


class Metrics:
    """The metrics of one server; gauges are read from its scheduler."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._registry = CollectorRegistry()

        def counter(name: str, about: str) -> Counter:
            return Counter(f"gsx_{name}", about, registry=self._registry)

        def histogram(name: str, about: str) -> Histogram:
            return Histogram(f"gsx_{name}_seconds", about, buckets=_BUCKETS, registry=self._registry)

        self._ends = {
            "finished": counter("finished", "continuations that ended normally"),
            "failed": counter("failed", "continuations that ended with an error"),
            "cancelled": counter("cancelled", "continuations whose client went away, or that took too long"),
            "refused": counter("refused", "requests that were not accepted"),
        }
        self._prompt = counter("prompt_tokens", "tokens of prompts of finished continuations")
        self._cached = counter("cached_tokens", "those of them whose K and V were there already")
        self._new = counter("new_tokens", "new tokens of finished continuations")
        self._kept = counter("kept_rows", "(token, branch) pairs that were kept")
        self._gated = counter("gated_rows", "(token, branch) pairs that the keep rule decided on")
        self._drafted = counter("drafted_tokens", "drafted tokens")
        self._accepted = counter("accepted_tokens", "drafted tokens that were correct")
        self._waited = histogram("waited", "from arrival to prefill")
        self._first = histogram("first_token", "from arrival to the first token")
        self._between = histogram("token", "between two tokens of a continuation, its mean")
        self._whole = histogram("request", "from arrival to the last token")
        for name, about, read in (
            ("under_way", "continuations that are running", lambda: scheduler.under_way),
            ("waiting", "continuations in the queue", lambda: scheduler.waiting),
        ):
            Gauge(f"gsx_{name}", about, registry=self._registry).set_function(read)

    def count(self, end: str) -> None:
        """Count a continuation or a request by its end: finished, failed, cancelled or refused."""
        self._ends[end].inc()

    def finished(self, result: Finished) -> None:
        """Count a continuation that ended normally."""
        stats = result.stats
        self.count("finished")
        self._prompt.inc(stats.prompt_tokens)
        self._cached.inc(result.cached_tokens)
        self._new.inc(stats.new_tokens)
        self._kept.inc(stats.kept_rows)
        self._gated.inc(stats.gated_rows)
        self._drafted.inc(sum(drafted for drafted, _ in stats.draft_rounds))
        self._accepted.inc(sum(accepted for _, accepted in stats.draft_rounds))
        self._waited.observe(result.waited_seconds)
        self._first.observe(result.first_token_seconds)
        self._whole.observe(result.first_token_seconds + stats.decode_seconds)
        if stats.new_tokens > 1:
            self._between.observe(stats.decode_seconds / (stats.new_tokens - 1))

    def text(self) -> bytes:
        """All of them, in Prometheus' text format."""
        return generate_latest(self._registry)
