"""The endpoints' metrics. See boreal.metrics."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import Metric

from boreal.metrics import counters, gauge, gauges, histograms
from control_plane.endpoints.choice import Endpoint
from control_plane.endpoints.server import Endpoints, Fate

_ENDPOINT = ("endpoint",)


def endpoint_metrics(endpoints: Endpoints) -> Iterator[Metric]:
    """What the process knows. For its event loop."""
    yield counters(
        "boreal_endpoint_connections_total",
        "Connections by what became of them: an instance has them, they were cancel requests, "
        "they were refused, or they were gone before.",
        ("endpoint", "fate"),
        (
            ((endpoint.value, fate.value), counts.fates[fate])
            for endpoint, counts in endpoints.counts.items()
            for fate in Fate
        ),
    )
    yield histograms(
        "boreal_endpoint_served_seconds",
        "From a connection's arrival until an instance had it.",
        _ENDPOINT,
        (((endpoint.value,), counts.served_after) for endpoint, counts in endpoints.counts.items()),
    )
    yield gauges(
        "boreal_endpoint_waiting_connections",
        "Connections that wait for an instance: there is none, or it takes none.",
        _ENDPOINT,
        (((endpoint.value,), count) for endpoint, count in endpoints.waiting.items()),
    )
    yield gauge(
        "boreal_endpoint_sessions",
        "Connections that instances have, as far as these endpoints handed them over.",
        endpoints.sessions,
    )
    routes = endpoints.routes
    roles = {
        Endpoint.WRITER: sum(route.writer for route in routes),
        Endpoint.READER: sum(not route.writer for route in routes),
    }
    yield gauges(
        "boreal_endpoint_routes",
        "Instances that an endpoint leads to. With no reader, the readers' leads to the writer.",
        _ENDPOINT,
        (((endpoint.value,), count) for endpoint, count in roles.items()),
    )
