"""What the registry counts and measures, for Prometheus (configuration and operations 4).

One object, made in `app.py`; whoever has something to tell gets one of its methods as a plain callable, and knows
nothing of Prometheus. What happens many thousand times a second is counted in plain integers where it happens and is
read here when somebody asks (`watch_...`).

No label ever names a tenant, a device, an auth-id or a raw path: their number has no bound.
"""

import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, Protocol

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.samples import Sample

__all__ = ["CONTENT_TYPE", "ApiTraffic", "ConnectionTraffic", "Durations", "Exported", "Metrics"]

CONTENT_TYPE: Final = b"text/plain; version=0.0.4; charset=utf-8"

# Configuration 4.2; 0.2 s is what an adapter waits for an answer by default.
_REQUEST_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1.0, 2.5)
_GROUP_BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_OF_THE_WHOLE: Final = frozenset(("kamado_ready", "kamado_build_info", "python_info"))
"""The same for all workers, or no business of one."""
_METHODS: Final = frozenset(("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"))


Exported = list[tuple[str, str, str, list[tuple[str, dict[str, str], float]]]]
"""Metrics on their way between processes: name, documentation, type; name, labels and value of each sample."""


class Durations(Protocol):
    """A histogram that somebody else keeps."""

    @property
    def bounds(self) -> Sequence[float]:
        """Upper bounds of all buckets but the last, seconds."""

    @property
    def counts(self) -> Sequence[int]:
        """How many fell into each bucket; one more than there are bounds."""

    @property
    def total(self) -> float:
        """Sum of all, seconds."""


class ApiTraffic(Protocol):
    """What one of the adapters' APIs counts."""

    @property
    def api(self) -> str:
        """The first segment of its addresses."""

    @property
    def answered(self) -> Mapping[str, Sequence[int]]:
        """Operation -> how many replies had the status that is the index."""

    @property
    def rejected(self) -> Mapping[str, int]:
        """Reason -> requests that got no reply."""

    @property
    def denied(self) -> Mapping[str, int]:
        """`link` and `operation` -> how many were refused for lack of a right."""

    @property
    def links(self) -> Mapping[str, int]:
        """`receiver` (requests) and `sender` (replies) -> open links."""

    @property
    def durations(self) -> Durations:
        """How long the replies took."""


class ConnectionTraffic(Protocol):
    """What the adapters' listeners count; `secure` or `insecure` is the port."""

    @property
    def open(self) -> Mapping[str, int]:
        """Port -> connections now."""

    @property
    def opened(self) -> Mapping[str, int]:
        """Port -> connections ever."""

    @property
    def closed(self) -> Mapping[tuple[str, str], int]:
        """Port and reason -> connections that ended."""


class Metrics:
    """Everything that is counted.

    Args:
        version: Of this program.
        labels: Put on every series (configuration 4.1, common labels).
    """

    def __init__(self, *, version: str, labels: Mapping[str, str]) -> None:
        registry = self._registry = CollectorRegistry(auto_describe=False)
        self._labels = labels
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)
        Gauge("kamado_build_info", "The program.", ("version", "python"), registry=registry).labels(
            version, platform.python_version()
        ).set(1)
        self._ready = Gauge("kamado_ready", "Whether /readiness says UP.", registry=registry)
        self._http_requests = Counter(
            "kamado_http_requests_total",
            "Requests to the management API.",
            ("route", "method", "status"),
            registry=registry,
        )
        self._http_durations = Histogram(
            "kamado_http_request_duration_seconds",
            "From the head of a request to the end of its answer.",
            ("route", "method"),
            buckets=_REQUEST_BUCKETS,
            registry=registry,
        )
        self._http: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}
        """Looking a series up by its labels costs more than counting."""
        self._logins = Counter(
            "kamado_sasl_attempts_total", "Logins of adapters.", ("mechanism", "outcome"), registry=registry
        )
        self._login_durations = Histogram(
            "kamado_sasl_duration_seconds",
            "How long it took to decide over a login.",
            ("mechanism",),
            buckets=_REQUEST_BUCKETS,
            registry=registry,
        )
        self._provisioning = Counter(
            "kamado_provisioning_total", "First contacts.", ("kind", "outcome"), registry=registry
        )
        self._hash_durations = Histogram(
            "kamado_hash_duration_seconds",
            "bcrypt, without the time in the queue.",
            ("pool",),
            buckets=_REQUEST_BUCKETS,
            registry=registry,
        )
        self._db_writes = Counter(
            "kamado_db_writes_total",
            "Writes: committed, refused (by a rule of the registry) or failed (together with their commit).",
            ("database", "outcome"),
            registry=registry,
        )
        self._db_groups = Histogram(
            "kamado_db_group_size",
            "Writes that shared a commit.",
            ("database",),
            buckets=_GROUP_BUCKETS,
            registry=registry,
        )
        self._db_durations = Histogram(
            "kamado_db_commit_duration_seconds",
            "From the begin of a transaction that writes to the end of its commit.",
            ("database", "outcome"),
            buckets=_REQUEST_BUCKETS,
            registry=registry,
        )
        self._search_durations = Histogram(
            "kamado_search_duration_seconds",
            "Searches that came to their end, with the time in the queue.",
            ("kind",),
            buckets=_REQUEST_BUCKETS,
            registry=registry,
        )
        self._search_rows = Counter(
            "kamado_search_rows_scanned_total", "Rows that searches have read.", ("kind",), registry=registry
        )
        self._searches_expensive = Counter(
            "kamado_search_expensive_total",
            "Searches that looked at as many rows as are configured as expensive.",
            ("kind",),
            registry=registry,
        )
        self._searches_unanswered = Counter(
            "kamado_search_unanswered_total",
            "Searches that took too long, or found too many others.",
            ("kind",),
            registry=registry,
        )
        self._lag = Histogram(
            "kamado_event_loop_lag_seconds",
            "How late the event loop gets to what is due.",
            buckets=_REQUEST_BUCKETS,
            registry=registry,
        )
        self._inventory: tuple[int, int] | None = None
        registry.register(_Read(self._inventory_families))
        self._expiry = Gauge(
            "kamado_tls_certificate_expiry_timestamp_seconds",
            "End of the certificate in use; of several CAs the first to end.",
            ("listener", "role"),
            registry=registry,
        )

    def render(self, *, is_ready: bool, workers: Mapping[int, Exported] | None = None) -> bytes:
        """Write everything in the text format of Prometheus, of content type `CONTENT_TYPE`.

        Args:
            is_ready: What `/readiness` says.
            workers: What `export` gave in worker processes, by number; their series get the label `worker`.
        """
        self._ready.set(is_ready)
        return generate_latest(_Page(self._registry, self._labels, workers or {}))

    def export(self) -> Exported:
        """Tell another process everything that is counted here, in values that JSON has."""
        return [
            (
                family.name,
                family.documentation,
                family.type,
                [(sample.name, sample.labels, sample.value) for sample in _without_beginnings(family)],
            )
            for family in self._registry.collect()
            if family.name not in _OF_THE_WHOLE
        ]

    # What is told

    def observe_http(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count a request to the management API.

        Args:
            route: Its template, from a closed set.
            method: As it came.
            status: Of the answer.
            seconds: From its head to the end of its answer.
        """
        key = route, method, status
        series = self._http.get(key)
        if series is None:
            name = method if method in _METHODS else "other"
            series = self._http_requests.labels(route, name, status), self._http_durations.labels(route, name)
            if method in _METHODS:
                self._http[key] = series
        series[0].inc()
        series[1].observe(seconds)

    def observe_login(self, mechanism: str, outcome: str, seconds: float) -> None:
        """Count a login of an adapter.

        Args:
            mechanism: `PLAIN` or `EXTERNAL`.
            outcome: In words, from a closed set.
            seconds: To decide over it.
        """
        self._logins.labels(mechanism, outcome).inc()
        self._login_durations.labels(mechanism).observe(seconds)

    def observe_provisioning(self, kind: str, outcome: str) -> None:
        """Count a first contact.

        Args:
            kind: `device`, `gateway` or `edge`; `device` where it has not come to the question.
            outcome: `created`, `found` or why not: an `errors.Reason`.
        """
        self._provisioning.labels(kind, outcome).inc()

    def observe_hash(self, pool: str, seconds: float) -> None:
        """Count a password that was hashed or verified; from any thread."""
        self._hash_durations.labels(pool).observe(seconds)

    def observe_commit(self, database: str, committed: int, refused: int, failed: int, seconds: float) -> None:
        """Count the writes that shared a transaction; from any thread.

        Args:
            database: Which, from a closed set.
            committed: Writes that are on disk.
            refused: Writes that undid themselves.
            failed: Writes that were lost, all of them, since the transaction was.
            seconds: From its begin to the end of its commit.
        """
        for outcome, number in (("committed", committed), ("refused", refused), ("failed", failed)):
            if number:
                self._db_writes.labels(database, outcome).inc(number)
        self._db_groups.labels(database).observe(committed + refused + failed)
        self._db_durations.labels(database, "failed" if failed else "committed").observe(seconds)

    def observe_search(self, kind: str, scanned: int, seconds: float, is_expensive: bool) -> None:
        """Count a search; from any thread.

        Args:
            kind: `tenants` or `devices`.
            scanned: Rows that it read, whether or not they matched.
            seconds: That it took.
            is_expensive: It read as many rows as are configured as expensive.
        """
        self._search_durations.labels(kind).observe(seconds)
        self._search_rows.labels(kind).inc(scanned)
        # Also when it is not: a series that is there from the beginning can be alerted on.
        self._searches_expensive.labels(kind).inc(is_expensive)

    def observe_unanswered_search(self, kind: str) -> None:
        """Count a search that took too long or found too many others."""
        self._searches_unanswered.labels(kind).inc()

    def observe_lag(self, seconds: float) -> None:
        """Take note of how late the event loop was."""
        self._lag.observe(seconds)

    def set_inventory(self, tenants: int, devices: int) -> None:
        """Tell how many tenants and devices there are; before that nothing is shown."""
        self._inventory = tenants, devices

    def set_certificate_expiry(self, listener: str, role: str, timestamp: float) -> None:
        """Tell until when a certificate of a listener is valid.

        Args:
            listener: `amqp` or `http`.
            role: `server` or `client_ca`.
            timestamp: Seconds since 1970.
        """
        self._expiry.labels(listener, role).set(timestamp)

    # What is read when somebody asks

    def watch_adapters(self, apis: Iterable[ApiTraffic], connections: ConnectionTraffic) -> None:
        """Show what the adapters' APIs and listeners count."""
        self._registry.register(_Read(lambda: _amqp_families(tuple(apis), connections)))

    def watch_queue(self, pool: str, read: Callable[[], int]) -> None:
        """Show how many passwords wait for a thread of a pool."""
        self._watch_gauge("kamado_hash_queue_depth", "Passwords that wait for a thread.", "pool", pool, read)

    def watch_writes(self, database: str, read: Callable[[], int]) -> None:
        """Show how many writes wait for a database."""
        self._watch_gauge("kamado_db_writes_waiting", "Writes that wait or run.", "database", database, read)

    def watch_workers(self, count: Callable[[], Mapping[str, int]], restarts: Callable[[], int]) -> None:
        """Show how many worker processes are in which state, and how often one was started again."""

        def families() -> Iterable[Metric]:
            family = GaugeMetricFamily("kamado_workers", "Worker processes.", labels=("state",))
            for state, number in count().items():
                family.add_metric((state,), number)
            yield family
            yield CounterMetricFamily(
                "kamado_worker_restarts_total", "Worker processes that ended and were started again.", value=restarts()
            )

        self._registry.register(_Read(families))

    def _inventory_families(self) -> Iterable[Metric]:
        if self._inventory is not None:
            tenants, devices = self._inventory
            yield GaugeMetricFamily("hono_tenants_total", "Tenants: what Hono's registries call it.", value=tenants)
            yield GaugeMetricFamily("kamado_devices", "Devices of all tenants.", value=devices)

    def _watch_gauge(self, name: str, documentation: str, label: str, value: str, read: Callable[[], int]) -> None:
        def families() -> Iterable[Metric]:
            family = GaugeMetricFamily(name, documentation, labels=(label,))
            family.add_metric((value,), read())
            yield family

        self._registry.register(_Read(families))


class _Read:
    """A collector that asks when it is asked."""

    def __init__(self, read: Callable[[], Iterable[Metric]]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        return self._read()


class _Page:
    """All series as they are shown: with the common labels, one block for each name."""

    def __init__(self, registry: CollectorRegistry, labels: Mapping[str, str], workers: Mapping[int, Exported]) -> None:
        self._registry = registry
        self._labels = labels
        self._workers = workers

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}

        def show(name: str, documentation: str, kind: str, samples: Iterable[Sample], more: Mapping[str, str]) -> None:
            shown = families.setdefault(name, Metric(name, documentation, kind))
            shown.samples += [sample._replace(labels={**sample.labels, **more, **self._labels}) for sample in samples]

        for family in self._registry.collect():
            show(family.name, family.documentation, family.type, _without_beginnings(family), {})
        for number, exported in self._workers.items():
            for name, documentation, kind, samples in exported:
                show(name, documentation, kind, [Sample(*sample) for sample in samples], {"worker": str(number)})
        return families.values()


def _without_beginnings(family: Metric) -> list[Sample]:
    """When each series began is in nobody's table and half as many lines again."""
    return [sample for sample in family.samples if not sample.name.endswith("_created")]


def _amqp_families(apis: Sequence[ApiTraffic], connections: ConnectionTraffic) -> Iterable[Metric]:
    requests = CounterMetricFamily(
        "kamado_amqp_requests_total", "Requests of adapters that got a reply.", labels=("api", "operation", "status")
    )
    durations = HistogramMetricFamily(
        "kamado_amqp_request_duration_seconds",
        "From reading a request to its reply being ready to be sent.",
        labels=("api",),
    )
    rejected = CounterMetricFamily(
        "kamado_amqp_rejected_total", "Requests of adapters that got no reply.", labels=("api", "reason")
    )
    denied = CounterMetricFamily(
        "kamado_authz_denied_total", "Links and requests refused for lack of a right.", labels=("api", "kind")
    )
    links = GaugeMetricFamily("kamado_amqp_links", "Open links.", labels=("api", "role"))
    for one in apis:
        for operation, counts in one.answered.items():
            for status, number in enumerate(counts):
                if number:
                    requests.add_metric((one.api, operation, str(status)), number)
        durations.add_metric((one.api,), _buckets(one.durations), one.durations.total)
        for family, numbers in ((rejected, one.rejected), (denied, one.denied), (links, one.links)):
            for name, number in numbers.items():
                family.add_metric((one.api, name), number)
    yield from (requests, durations, rejected, denied, links)
    now = GaugeMetricFamily("kamado_amqp_connections", "Connections of adapters.", labels=("port",))
    opened = CounterMetricFamily(
        "kamado_amqp_connections_opened_total", "Connections of adapters ever.", labels=("port",)
    )
    closed = CounterMetricFamily(
        "kamado_amqp_connections_closed_total", "Connections of adapters that ended.", labels=("port", "reason")
    )
    for family, by_port in ((now, connections.open), (opened, connections.opened)):
        for port, number in by_port.items():
            family.add_metric((port,), number)
    for (port, reason), number in connections.closed.items():
        closed.add_metric((port, reason), number)
    yield from (now, opened, closed)


def _buckets(durations: Durations) -> list[tuple[str, float]]:
    """Return cumulative buckets, as Prometheus has them."""
    bounds = [*map(str, durations.bounds), "+Inf"]
    reached = 0
    buckets = []
    for bound, number in zip(bounds, durations.counts, strict=True):
        reached += number
        buckets.append((bound, float(reached)))
    return buckets
