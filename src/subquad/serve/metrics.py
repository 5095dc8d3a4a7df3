"""What Prometheus reads: counters of tokens and guesses, gauges of queues and state, histograms of time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from subquad.engine.trace import Look
from subquad.serve.served import Served

TEXT_FORMAT = "text/plain; version=0.0.4; charset=utf-8"
WAITS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
STEPS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
WHOLE = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """All figures of one server, in a registry of their own."""

    def __init__(self, served: Sequence[Served]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Gauges(served))

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"subquad_{name}", text, ("model", *labels), registry=self.registry)

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"subquad_{name}", text, ("model",), buckets=buckets, registry=self.registry)

        self.requests = counter("requests", "Requests by how they ended.", "endpoint", "outcome")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts.")
        self.tokens = counter("tokens", "Tokens given to all rows; their rate is tokens a second.")
        self.guesses = counter("guesses", "Guesses by what became of them: read, judged, kept.", "what")
        self.first = histogram("time_to_first_token_seconds", "From a request to its first token.", WAITS)
        self.each = histogram(
            "time_per_token_seconds", "Between tokens of a request, the mean of those that came together.", STEPS
        )
        self.whole = histogram("request_seconds", "From a request to its end.", WHOLE)
        for one in served:
            one.worker.engine.on_look = self._looker(one.name)

    def _looker(self, model: str):
        tokens = self.tokens.labels(model)
        read, judged, kept = (self.guesses.labels(model, what) for what in ("read", "judged", "kept"))

        def on_look(look: Look) -> None:
            tokens.inc(look.tokens)
            read.inc(look.guessed)
            judged.inc(look.judged)
            kept.inc(look.kept)

        return on_look

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)


def merge(replicas: Mapping[str, Iterable[Metric]]) -> bytes:
    """The figures of several servers in Prometheus' text format, each with a label ``replica``.

    Args:
        replicas: what each one's registry collects.
    """
    merged: dict[str, Metric] = {}
    for name, metrics in replicas.items():
        for metric in metrics:
            one = merged.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
            one.samples += [sample._replace(labels={**sample.labels, "replica": name}) for sample in metric.samples]
    registry = CollectorRegistry()
    registry.register(_Given(merged.values()))
    return generate_latest(registry)


class _Given(Collector):
    """What was collected elsewhere."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self.metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """All of it."""
        yield from self.metrics


class _Gauges(Collector):
    """What stands at the moment of reading."""

    def __init__(self, served: Sequence[Served]) -> None:
        self.served = served

    def collect(self) -> Iterator[Metric]:
        """One reading."""

        def gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
            return GaugeMetricFamily(f"subquad_{name}", text, labels=("model", *labels))

        def counter(name: str, text: str) -> CounterMetricFamily:
            return CounterMetricFamily(f"subquad_{name}", text, labels=("model",))

        queue, rows = gauge("queue_length", "Requests that wait."), gauge("rows", "Slots there are.")
        batch, paused = gauge("batch", "Requests that hold a slot."), gauge("paused", "Requests put aside.")
        state = gauge("state_bytes", "Bytes of state: slots in use, aside, prefixes kept, allocated.", "kind")
        accepted = gauge("accepted_share", "Share of guesses that stand when it is their turn, recent ones.")
        preemptions = counter("preemptions", "Rows that were put aside for one that waited.")
        hits, misses = counter("prefix_hits", "Prompts whose beginning was known."), counter("prefix_misses", "Others.")
        saved = counter("prefix_tokens_saved", "Tokens of prompts that were not read again.")
        for one in self.served:
            worker, engine, label = one.worker, one.worker.engine, [one.name]
            queue.add_metric(label, worker.queued)
            rows.add_metric(label, engine.rows)
            batch.add_metric(label, worker.live)
            paused.add_metric(label, worker.paused)
            for kind, nbytes in worker.state_nbytes.items():
                state.add_metric([*label, kind], nbytes)
            accepted.add_metric(label, engine.pace.accepted)
            preemptions.add_metric(label, worker.preemptions)
            if engine.prefixes is not None:
                hits.add_metric(label, engine.prefixes.hits)
                misses.add_metric(label, engine.prefixes.misses)
                saved.add_metric(label, engine.prefixes.tokens_saved)
        yield from (queue, rows, batch, paused, state, accepted, preemptions, hits, misses, saved)
