"""What an ingress counts of the requests that it serves: a handful of observations a request, when it ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import Protocol

from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.registry import CollectorRegistry

from app.telemetry import metrics
from app.telemetry.metrics import MetricDefinition
from app.telemetry.samples import MetricSample, collect_samples

# As nginx has it: nobody was left to answer.
CLIENT_WENT_AWAY = 499


class TokenCounts(Protocol):
    """Tokens of one HTTP request so far: the ingress's Usage."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class IngressMetrics:
    """The counters of one ingress, in a registry of their own. On its event loop."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self._registry = CollectorRegistry(auto_describe=False)
        self.requests = self._counter(metrics.REQUESTS)
        self.time_to_first_token = self._histogram(metrics.TIME_TO_FIRST_TOKEN)
        self.time_per_output_token = self._histogram(metrics.TIME_PER_OUTPUT_TOKEN)
        self.request_duration = self._histogram(metrics.REQUEST_DURATION)
        self.queue_time = self._histogram(metrics.QUEUE_TIME)
        self.prompt_tokens = self._counter(metrics.PROMPT_TOKENS)
        self.cached_prompt_tokens = self._counter(metrics.CACHED_PROMPT_TOKENS)
        self.output_tokens = self._counter(metrics.OUTPUT_TOKENS)
        self.open_requests = Gauge(
            metrics.OPEN_REQUESTS.name,
            metrics.OPEN_REQUESTS.help,
            metrics.OPEN_REQUESTS.labels,
            registry=self._registry,
        )

    def arrived(self, endpoint: str) -> RequestRecord:
        """A request has arrived at `chat` or `completions`."""
        return RequestRecord(self, endpoint)

    def samples(self) -> list[MetricSample]:
        """All numbers now."""
        return collect_samples(self._registry)

    def _counter(self, metric: MetricDefinition) -> Counter:
        return Counter(metric.name, metric.help, metric.labels, registry=self._registry)

    def _histogram(self, metric: MetricDefinition) -> Histogram:
        return Histogram(metric.name, metric.help, metric.labels, registry=self._registry, buckets=metric.buckets)


class RequestRecord:
    """One HTTP request, from its arrival to its end. `end` is idempotent, and the only costly call.

    Attributes:
        code: HTTP status that the request counts under; a client that went away until something else is known.
        endpoint: `chat` or `completions`.
        model_id: of the model that it goes to; empty until that is known.
        class_name: of the model's classes, the one that it is served in; empty until that is known.
        usage: of its tokens; None until it is known to be sound.
        finish_reasons: of its choices that have all that was asked for.
        exemplar: names its trace on the histograms, if it is traced.
    """

    def __init__(self, ingress: IngressMetrics, endpoint: str) -> None:
        self._metrics = ingress
        self.endpoint = endpoint
        self._began_s = ingress.clock()
        self._first_s: float | None = None
        self._last_s = 0.0
        self._queue_s = 0.0
        self.model_id = self.class_name = ""
        self.usage: TokenCounts | None = None
        self._num_choices = 1
        self._ended = False
        self.exemplar: dict[str, str] | None = None
        self.finish_reasons: set[str] = set()
        self._observers: tuple[Callable[[RequestRecord], None], ...] = ()
        self.code: int = CLIENT_WENT_AWAY

    @property
    def duration_s(self) -> float:
        """From its arrival until now."""
        return self._metrics.clock() - self._began_s

    @property
    def first_token_s(self) -> float | None:
        """From its arrival to its first tokens; None before them."""
        return None if self._first_s is None else self._first_s - self._began_s

    def generates(self, model_id: str, class_name: str, usage: TokenCounts, num_choices: int) -> None:
        """It is sound, and goes to a model in one of its classes. `usage` is read again at the end."""
        self.model_id, self.class_name = model_id, class_name
        self.usage, self._num_choices = usage, num_choices
        self._metrics.open_requests.labels(model_id).inc()

    def first_tokens(self, waited_s: float) -> None:
        """The first tokens of one of its prompts have come, which had waited so long for their first step."""
        if self._first_s is None:
            self._first_s = self._metrics.clock()
            self._queue_s = waited_s

    def last_tokens(self, finish_reasons: Iterable[str] = ()) -> None:
        """The last tokens of one of its prompts have come, whose choices ended for these reasons."""
        self._last_s = self._metrics.clock()
        self.finish_reasons.update(finish_reasons)

    def when_ended(self, observer: Callable[[RequestRecord], None]) -> None:
        """Have an observer told once, at its end."""
        self._observers += (observer,)

    def end(self) -> None:
        """Its answer has ended, however it did."""
        if self._ended:
            return
        self._ended = True
        for observer in self._observers:
            observer(self)
        kept, model_id, class_name = self._metrics, self.model_id, self.class_name
        kept.requests.labels(model_id, self.endpoint, str(int(self.code))).inc()
        usage = self.usage
        if usage is None:
            return
        kept.open_requests.labels(model_id).dec()
        kept.prompt_tokens.labels(model_id).inc(usage.prompt_tokens)
        kept.cached_prompt_tokens.labels(model_id).inc(usage.cached_tokens)
        kept.output_tokens.labels(model_id).inc(usage.completion_tokens)
        if self._first_s is None:
            return
        kept.time_to_first_token.labels(model_id, class_name).observe(self._first_s - self._began_s, self.exemplar)
        kept.queue_time.labels(model_id, class_name).observe(self._queue_s, self.exemplar)
        gaps = usage.completion_tokens / self._num_choices - 1
        if gaps > 0 and self._last_s > self._first_s:
            kept.time_per_output_token.labels(model_id, class_name).observe(
                (self._last_s - self._first_s) / gaps, self.exemplar
            )
        if self.code == HTTPStatus.OK:
            # A failed or abandoned request says nothing of how long one takes.
            kept.request_duration.labels(model_id, class_name).observe(kept.clock() - self._began_s, self.exemplar)
