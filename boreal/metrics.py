"""Prometheus metrics of one process: how they are served, and how they are put together.

A process keeps counters and histograms where things happen, for itself. Only a scrape makes metrics
of them: it comes to a thread of its own, hops onto the event loop, where all of that may be read
safely, and is put into text in the thread again. So metrics cost nothing on any hot path but the
counting, and a process whose loop hangs fails its scrapes, which is as it should be.

Names follow Prometheus' conventions: `boreal_`, what it is, the base unit; counters end in
`_total`. Positions in the log (LSNs) are bytes, so that a rate of one is bytes a second. Who it is
(`instance`, `zone`, `component`) is said by the scraper's target labels, and by
`boreal_process_info`; labels here are only for what a process knows of others.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from importlib.metadata import version
from socketserver import TCPServer
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import structlog
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import make_wsgi_app
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from boreal.errors import BadUsage
from boreal.histogram import Durations, Sizes

Collect = Callable[[], Iterable[Metric]]
"""Reads what a process knows. Called on its event loop; takes a millisecond, not ten."""

_LOOP_WITHIN_S = 5.0
"""So long the event loop may take to answer; Prometheus itself gives up after ten."""
_CLIENT_WITHIN_S = 5.0
"""So long a scraper may take to say what it wants, and to take the answer."""
_THREAD_ENDS_WITHIN_S = 1.0
_UNITS = ("seconds", "bytes")

_log = structlog.get_logger(__name__)


# --- serving -------------------------------------------------------------------------------------


@asynccontextmanager
async def served(
    host: str,
    port: int | None,
    collect: Collect,
    *,
    about: Mapping[str, str],
    aside: Collect | None = None,
) -> AsyncIterator[None]:
    """Within it, `collect` is what a scrape of http://HOST:PORT/metrics finds; no port: nothing is.

    `about` says what kind of process this is, and which one. `aside` is called in the scrape's own
    thread: for what takes the file system, and nothing of the event loop's. BadUsage if the port is
    taken.
    """
    if port is None:
        yield
        return
    registry = CollectorRegistry()
    registry.register(_OnLoop(asyncio.get_running_loop(), collect))
    registry.register(_Aside(about, aside))
    ProcessCollector(registry=registry)
    server = _listen(host, port)
    # Within one machine or one zone, compressing costs more than it saves.
    server.set_app(make_wsgi_app(registry, disable_compression=True))
    thread = threading.Thread(target=server.answer_scrapes, name="metrics", daemon=True)
    thread.start()
    _log.info("metrics are served", address=f"{host}:{port}")
    try:
        yield
    finally:
        server.end()
        await asyncio.to_thread(thread.join, _THREAD_ENDS_WITHIN_S)
        server.server_close()


class _OnLoop(Collector):
    """What is collected on the event loop, for whoever is in another thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, collect: Collect) -> None:
        self._loop = loop
        self._collect = collect

    def collect(self) -> Iterable[Metric]:
        """Hop onto the loop. TimeoutError if it does not get to it: the scrape fails."""
        found: concurrent.futures.Future[list[Metric]] = concurrent.futures.Future()
        self._loop.call_soon_threadsafe(self._answer, found)
        return found.result(_LOOP_WITHIN_S)

    def _answer(self, found: concurrent.futures.Future[list[Metric]]) -> None:
        try:
            found.set_result(list(self._collect()))
        except Exception as error:  # noqa: BLE001 - it is the scrape's, which raises it
            found.set_exception(error)


class _Aside(Collector):
    """What needs no event loop: who this is, and what `aside` finds."""

    def __init__(self, about: Mapping[str, str], aside: Collect | None) -> None:
        self._about = {**about, "version": version("boreal")}
        self._aside = aside

    def collect(self) -> Iterable[Metric]:
        """In the scrape's thread."""
        yield InfoMetricFamily(
            "boreal_process", "Which process of the cluster this is.", value=self._about
        )
        if self._aside is not None:
            yield from self._aside()


class _Handler(WSGIRequestHandler):
    """One scrape."""

    timeout = _CLIENT_WITHIN_S

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's
        """A scrape is nothing to tell of."""


class _Server(WSGIServer):
    """Answers scrapes one at a time, each within bounds; a few more wait in the kernel's backlog.

    (prometheus_client's own server makes a thread for each connection, as many as come.)
    """

    ending = False

    def __init__(self, family: socket.AddressFamily, address: tuple[str, int]) -> None:
        """Listen. OSError if that is impossible."""
        self.address_family = family
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        """As WSGIServer's, without its look-up of the machine's name, which may wait for DNS."""
        TCPServer.server_bind(self)
        host, self.server_port = self.server_address[:2]
        self.server_name = str(host)
        self.setup_environ()

    def answer_scrapes(self) -> None:
        """Until `end` is called."""
        while not self.ending:
            self.handle_request()

    def end(self) -> None:
        """Have `answer_scrapes` return, after the scrape under way if there is one."""
        self.ending = True
        with suppress(OSError):  # it was never connected, says the kernel, and wakes who waits
            self.socket.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:  # noqa: ARG002
        """A scraper went away, or said nothing in time."""
        _log.info("a scrape broke", by=str(client_address), why=str(sys.exc_info()[1]))


def _listen(host: str, port: int) -> _Server:
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return _Server(family, (str(address[0]), port))
    except OSError as error:
        raise BadUsage(
            f"cannot serve metrics on {host}:{port}: {error.strerror or error}; free that port or "
            "choose another --metrics-port"
        ) from error


# --- putting metrics together --------------------------------------------------------------------

Rows = Iterable[tuple[Sequence[str], float]]
"""Values, each under the values of its labels."""


def gauge(name: str, text: str, value: float) -> Metric:
    """A value that goes up and down."""
    return gauges(name, text, (), [((), value)])


def gauges(name: str, text: str, labels: Sequence[str], rows: Rows) -> Metric:
    """Several of them."""
    family = GaugeMetricFamily(name, text, labels=labels, unit=_unit(name))
    for values, value in rows:
        family.add_metric(values, value)
    return family


def counter(name: str, text: str, value: float) -> Metric:
    """What only grows while the process lives. The name ends in `_total`."""
    return counters(name, text, (), [((), value)])


def counters(name: str, text: str, labels: Sequence[str], rows: Rows) -> Metric:
    """Several of them."""
    family = CounterMetricFamily(name, text, labels=labels, unit=_unit(name.removesuffix("_total")))
    for values, value in rows:
        family.add_metric(values, value)
    return family


def histogram(name: str, text: str, observed: Durations | Sizes) -> Metric:
    """What was observed since the process began, or the life it belongs to."""
    return histograms(name, text, (), [((), observed)])


def histograms(
    name: str,
    text: str,
    labels: Sequence[str],
    rows: Iterable[tuple[Sequence[str], Durations | Sizes]],
) -> Metric:
    """Several of them."""
    family = HistogramMetricFamily(name, text, labels=labels, unit=_unit(name))
    for values, observed in rows:
        reading = observed.reading()
        buckets = [(_bound(bound), float(count)) for bound, count in reading.buckets]
        family.add_metric(values, [*buckets, ("+Inf", float(reading.observations))], reading.total)
    return family


def _bound(bound: float) -> str:
    """As Prometheus itself writes it: 0.000128, 1.048575e+06."""
    return str(floatToGoString(bound))  # type: ignore[no-untyped-call]


def _unit(name: str) -> str:
    return next((unit for unit in _UNITS if name.endswith("_" + unit)), "")
