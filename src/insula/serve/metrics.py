"""What the server counts, for Prometheus and for its own page. A registry of its own: nothing is global."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Upper bounds in seconds."""
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """`requests{outcome}`: "answered", or the kind of the refusal."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter("insula_requests", "Requests by outcome", ["outcome"], registry=self.registry)
        self._dropped = Counter(
            "insula_dropped", "Work nobody waited for any more, by where it was", ["where"], registry=self.registry
        )
        self._total = Histogram(
            "insula_request_seconds", "From a request to its reply", buckets=BUCKETS, registry=self.registry
        )
        self._waited = Histogram("insula_wait_seconds", "Time in line", buckets=BUCKETS, registry=self.registry)
        self._inferred = Histogram("insula_infer_seconds", "One batch", buckets=BUCKETS, registry=self.registry)
        self._thoughts = Counter("insula_thoughts", "Subtasks by outcome", ["outcome"], registry=self.registry)
        self._thinking = Histogram(
            "insula_think_seconds", "One batch of thoughts", buckets=BUCKETS, registry=self.registry
        )
        self._batches = Histogram(
            "insula_batch_size", "Requests of one batch", buckets=(1, 2, 4, 8, 16, 32, 64), registry=self.registry
        )
        self._connections = Gauge("insula_connections", "Robots that are connected", registry=self.registry)
        self._ready = Gauge("insula_ready", "1 once every batch size is compiled", registry=self.registry)

    def answered(self, total: float, waited: float) -> None:
        """A reply was sent; seconds since its request came, and of those in line."""
        self._requests.labels("answered").inc()
        self._total.observe(total)
        self._waited.observe(waited)

    def refused(self, kind: str) -> None:
        """A typed error was sent."""
        self._requests.labels(kind).inc()

    def batch(self, size: int, seconds: float) -> None:
        """One call of the policy."""
        self._batches.observe(size)
        self._inferred.observe(seconds)

    def thought(self, said: int, failed: int, seconds: float) -> None:
        """One batch of thoughts: those that gave a subtask, and those that did not."""
        self._thoughts.labels("said").inc(said)
        self._thoughts.labels("failed").inc(failed)
        self._thinking.observe(seconds)

    def unwanted(self) -> None:
        """A chunk was made for a robot that has gone."""
        self._dropped.labels("running").inc()

    def abandoned(self) -> None:
        """A robot has gone while its request was in line."""
        self._dropped.labels("waiting").inc()

    def connections(self, count: int) -> None:
        """How many there are now."""
        self._connections.set(count)

    def ready(self, value: bool) -> None:
        """Whether requests are answered."""
        self._ready.set(value)

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self.registry)

    def latencies(self) -> list[tuple[float, int]]:
        """(upper bound in seconds, requests in that bucket), the last bound infinite."""
        found = [
            (float(sample.labels["le"]), int(sample.value))
            for metric in self._total.collect()
            for sample in metric.samples
            if sample.name.endswith("_bucket")
        ]
        below = [0, *(count for _, count in found)]  # Prometheus' buckets hold all below, too
        return [(bound, count - less) for (bound, count), less in zip(found, below, strict=False)]

    def outcomes(self) -> dict[str, int]:
        """Requests by outcome."""
        return {
            sample.labels["outcome"]: int(sample.value)
            for metric in self._requests.collect()
            for sample in metric.samples
            if sample.name.endswith("_total")
        }
