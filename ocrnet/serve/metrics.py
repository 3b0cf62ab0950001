"""The server's metrics in Prometheus text format."""

import bisect
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import psutil

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
IMAGES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)


class Histogram:
    """Counts of values per bucket for each set of labels; ``bounds`` are the upper bounds of the buckets."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts: dict[str, list[int]] = {}
        self._sums: Counter[str] = Counter()

    def add(self, value: float, labels: str = "") -> None:
        """Count a value; ``labels`` are in Prometheus syntax, for example path="/predict"."""
        counts = self._counts.setdefault(labels, [0] * (len(self._bounds) + 1))
        counts[bisect.bisect_left(self._bounds, value)] += 1
        self._sums[labels] += value  # type: ignore[assignment]

    def lines(self, name: str) -> list[str]:
        """Return the lines of the metric ``name``: cumulative bucket counts, sum and count."""
        samples = []
        for labels, counts in sorted(self._counts.items()):
            total, prefix = 0, f"{labels}," if labels else ""
            for bound, count in zip((*map(str, self._bounds), "+Inf"), counts, strict=True):
                total += count
                samples.append(f'{name}_bucket{{{prefix}le="{bound}"}} {total}')
            braces = f"{{{labels}}}" if labels else ""
            samples += [f"{name}_sum{braces} {self._sums[labels]}", f"{name}_count{braces} {total}"]
        return samples


class Metrics:
    """All metrics of a server; a lock protects them, because the worker thread and the server's thread update them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[str] = Counter()
        self._seconds, self._batches, self._network = Histogram(SECONDS), Histogram(IMAGES), Histogram(SECONDS)
        self._process = psutil.Process()

    def request(self, path: str, status: int, seconds: float) -> None:
        """Count a completed request.

        Args:
            path: The path of the route, or "other".
            status: The HTTP status of the response.
            seconds: The time from the request's headers to the end of the response.
        """
        with self._lock:
            self._requests[f'path="{path}",status="{status}"'] += 1
            self._seconds.add(seconds, f'path="{path}"')

    def batch(self, images: int, seconds: float) -> None:
        """Count a predicted batch and its time in seconds."""
        with self._lock:
            self._batches.add(images)
            self._network.add(seconds)

    def text(self, gauges: Mapping[str, tuple[str, Callable[[], float]]]) -> str:
        """Return all metrics as text; ``gauges`` is {name: (help text, function that returns the current value)}."""
        with self._lock:
            requests = [f"ocrnet_requests_total{{{labels}}} {n}" for labels, n in sorted(self._requests.items())]
            parts = [
                ("ocrnet_requests_total", "counter", "Completed requests.", requests),
                *(
                    (name, "histogram", text, histogram.lines(name))
                    for name, text, histogram in (
                        (
                            "ocrnet_request_seconds",
                            "Seconds from a request's headers to the end of its response.",
                            self._seconds,
                        ),
                        ("ocrnet_batch_images", "Images per batch.", self._batches),
                        ("ocrnet_network_seconds", "Inference time of a batch in seconds.", self._network),
                    )
                ),
            ]
        memory = ("Resident memory of the server.", lambda: float(self._process.memory_info().rss))
        for name, (text, value) in {**gauges, "process_resident_memory_bytes": memory}.items():
            parts.append((name, "gauge", text, [f"{name} {value():g}" if value() < 1e6 else f"{name} {value():.0f}"]))
        lines = []
        for name, kind, text, samples in parts:
            lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}", *samples]
        return "\n".join(lines) + "\n"
