"""The HTTP routes of the server: page, predictions, health, metrics, and the OpenAPI description."""

import asyncio
import contextlib
import hmac
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from typing import Any, TypeVar

from ocrnet.config import EVAL_SCALES, Eval
from ocrnet.serve import openapi, request_body, responses
from ocrnet.serve.errors import Refused
from ocrnet.serve.metrics import Metrics
from ocrnet.serve.middleware import FAULT, Guard
from ocrnet.serve.network import Network
from ocrnet.serve.settings import Settings
from ocrnet.serve.worker import Job, Prediction, Worker
from ocrnet.utils.version import __version__

T = TypeVar("T")

PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/arrays.js": ("arrays.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
AVERAGING = ("multi_scale", "flip")
OUTPUTS = ("labels", "overlay", "color", "json")
THREADS = 4  # threads for decoding and encoding; OpenCV and zlib release the GIL


class Service:
    """State shared by the routes; call its methods only from the server's event loop."""

    def __init__(self, network: Network, worker: Worker, metrics: Metrics, settings: Settings) -> None:
        self.network, self.worker, self.metrics, self.settings = network, worker, metrics, settings
        self.reader = request_body.Reader(settings.max_bytes)
        self.pool = ThreadPoolExecutor(THREADS, thread_name_prefix="images")
        self.stopping = False

    async def off_loop(self, call: Callable[..., T], *given: Any) -> T:
        """Run a slow call in the thread pool, so that it does not block the event loop; return its result."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, call, *given)

    def check_token(self, headers: Any) -> None:
        """Raise `Refused` if a token is configured and the request does not carry it."""
        if self.settings.token is None:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # mutation: compare-token
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.encode(), self.settings.token.encode()):
            raise Refused(401, "this server requires a token", {"WWW-Authenticate": "Bearer"})

    async def answer(self, request: Any, *, explain: bool, finish: Callable[[Any, Prediction, float], T]) -> T:
        """Read the image of a request, predict it, and return the result of ``finish``.

        Args:
            request: The request, with the image as its body or in a form.
            explain: Whether to return confidence and relation as well, if the network supports them.
            finish: Builds the response from the image, the prediction and the elapsed seconds; runs in the thread pool.

        Returns:
            The return value of ``finish``.

        Raises:
            Refused: The request is unauthorized, invalid, too large, too slow or abandoned, or the server is busy.
        """
        self.check_token(request.headers)
        eval_cfg = _eval_cfg(request.query_params, AVERAGING if explain else ("output", *AVERAGING))
        if (len(eval_cfg.scales) > 1 or eval_cfg.flip) and not self.network.averages:
            raise Refused(400, "this network outputs only labels: multi_scale and flip must be false")
        # mutation: full-server-reads-no-body
        self.worker.check_room()
        with contextlib.ExitStack() as place:
            async with self.reader.read(request.headers, request.stream().__aiter__()) as data:
                begun = time.monotonic()
                head = await self.off_loop(request_body.look_at, data, self.settings.max_pixels)
                place.enter_context(self.worker.enter(head.pixels))
                image = await self.off_loop(request_body.decode, data, head)
            # mutation: free-body-before-inference
            del data  # the reader no longer counts these bytes, and inference may take long
            left = begun + self.settings.timeout - time.monotonic()
            seen = await self._wait(Job(image, eval_cfg, explain), request.receive, left)
            return await self.off_loop(finish, image, seen, time.monotonic() - begun)

    async def _wait(self, job: Job, receive: Callable[[], Any], seconds: float) -> Prediction:
        """Wait for the prediction; raise `Refused` if the client disconnects or ``seconds`` pass."""
        future = asyncio.wrap_future(self.worker.submit(job))
        gone = asyncio.ensure_future(receive())  # the body is read, so the next message is the disconnect
        try:
            # mutation: time-out-request
            await asyncio.wait({future, gone}, timeout=seconds, return_when="FIRST_COMPLETED")
            if future.done():
                return future.result()
            if gone.done():
                raise Refused(499, "the client closed the connection")
            raise Refused(504, f"prediction took longer than {self.settings.timeout:g} seconds", {"Retry-After": "10"})
        finally:
            gone.cancel()
            # mutation: cancel-abandoned-request
            job.future.cancel()  # the worker skips the job if it is still queued
            # mutation: cancel-abandoned-request
            future.cancel()

    def about(self) -> dict[str, Any]:
        """Return the network's description and the server's limits, as the page uses them."""
        model, arch = self.network.model, self.network.model.arch
        return {
            "network": f"OCRNet-HRNet-W{arch.width}",
            "version": __version__,
            "classes": [
                {"index": i, "name": name, "color": responses.color(rgb)}
                for i, (name, rgb) in enumerate(zip(model.names, model.palette, strict=True))
            ],
            "max_bytes": self.settings.max_bytes,
            "max_pixels": self.settings.max_pixels,
            "formats": list(request_body.KINDS.values()),
            "scales": list(EVAL_SCALES),
            "averages": self.network.averages,
            "explains": self.network.explains,
        }

    def gauges(self) -> dict[str, tuple[str, Callable[[], float]]]:
        """Return the current gauges for the metrics: {name: (help text, function that returns the value)}."""
        return {
            "ocrnet_requests_in_work": ("Requests being decoded, waiting or predicted.", lambda: self.worker.requests),
            "ocrnet_waiting": ("Images waiting for the network.", lambda: self.worker.waiting),
        }


def build(service: Service) -> Any:
    """Return the ASGI application."""
    from fastapi import FastAPI
    from fastapi.responses import JSONResponse, Response
    from starlette.requests import ClientDisconnect, Request

    # No documentation pages: FastAPI's pages load their scripts from other sites.
    app = FastAPI(
        title="ocrnet serve", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False,
        description=openapi.ABOUT,
    )  # fmt: skip
    app.openapi_version = "3.0.3"

    def page(name: str, kind: str) -> Callable:
        data = (resources.files("ocrnet.serve") / "page" / name).read_bytes()

        async def send() -> Response:
            return Response(data, media_type=kind, headers={"Cache-Control": "no-cache"})

        return send

    for path, (name, kind) in PAGE.items():
        app.add_api_route(path, page(name, kind), methods=["GET", "HEAD"], include_in_schema=False)

    @app.post("/predict", openapi_extra=openapi.PREDICT, responses=openapi.predict_answers(), response_model=None)
    async def predict(request: Request) -> Response:
        """Segment an image."""
        wanted = _output(request)
        model = service.network.model

        def finish(image: Any, seen: Prediction, seconds: float) -> Response:
            if wanted == "json":
                return JSONResponse(responses.summary(model, seen, seconds))
            if wanted == "overlay":
                return Response(responses.overlay_png(model, image, seen), media_type="image/png")
            array = seen.labels if wanted == "labels" else responses.painted(model, seen)
            return Response(responses.png(array), media_type="image/png")

        return await service.answer(request, explain=False, finish=finish)

    @app.post("/explain", openapi_extra=openapi.EXPLAIN, responses=openapi.explain_answers(), response_model=None)
    async def explain(request: Request) -> Response:
        """Segment an image; return labels, confidence and the relation of each pixel to the object regions."""
        zipped = "gzip" in request.headers.get("accept-encoding", "")

        def finish(image: Any, seen: Prediction, seconds: float) -> Response:
            head = responses.summary(service.network.model, seen, seconds)
            data = responses.arrays(head, seen, zipped=zipped)
            headers = {"Content-Encoding": "gzip"} if zipped else {}
            return Response(data, media_type="application/octet-stream", headers=headers)

        return await service.answer(request, explain=True, finish=finish)

    @app.get("/model", responses=openapi.REFUSALS_OF_MODEL)
    async def model(request: Request) -> dict[str, Any]:
        """Return the network's classes and this server's limits."""
        service.check_token(request.headers)
        return service.about()

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> JSONResponse:
        """Return 200 while new requests are accepted, and 503 during shutdown."""
        status = "stopping" if service.stopping else "ok"
        return JSONResponse({"status": status}, 503 if service.stopping else 200)

    @app.get("/metrics", responses=openapi.METRICS, response_class=Response)
    async def metrics(request: Request) -> Response:
        """Return the metrics in Prometheus text format."""
        service.check_token(request.headers)
        return Response(service.metrics.text(service.gauges()), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.exception_handler(Refused)
    async def refused(request: Request, why: Refused) -> JSONResponse:
        return JSONResponse({"error": why.text}, why.status, why.headers)

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, why: ClientDisconnect) -> JSONResponse:
        return JSONResponse({"error": "the client closed the connection"}, 499)

    @app.exception_handler(404)
    async def unknown(request: Request, why: Exception) -> JSONResponse:
        return JSONResponse({"error": "unknown path; see /openapi.json"}, 404)

    @app.exception_handler(405)
    async def wrong_method(request: Request, why: Exception) -> JSONResponse:
        allow = getattr(why, "headers", None)
        return JSONResponse({"error": "this path does not support this method; see /openapi.json"}, 405, allow)

    @app.exception_handler(Exception)
    async def fault(request: Request, why: Exception) -> JSONResponse:  # Guard logs the exception
        return JSONResponse({"error": FAULT}, 500)

    known = {*PAGE, *app.openapi()["paths"], "/openapi.json"}
    return Guard(app, service.metrics, known, service.settings.hosts)


def _eval_cfg(query: Any, known: Sequence[str]) -> Eval:
    """Return the evaluation options of a query; raise `Refused` for a name not in ``known`` or an invalid value."""
    for name in query:
        if name not in known:
            raise Refused(400, f"unknown parameter '{name[:40]}'; supported: {', '.join(known)}")
    chosen = {}
    for name in AVERAGING:
        text = query.get(name, "false").lower()
        if text not in ("true", "false", "1", "0"):
            raise Refused(400, f"{name} must be true or false")
        chosen[name] = text in ("true", "1")
    return Eval(scales=EVAL_SCALES if chosen["multi_scale"] else (1.0,), flip=chosen["flip"])


def _output(request: Any) -> str:
    """Return the requested output: that of the query, else JSON if Accept names it and no image type, else labels."""
    accept = request.headers.get("accept", "")
    preferred = "json" if "application/json" in accept and "image/" not in accept else "labels"
    wanted = request.query_params.get("output", preferred)
    if wanted not in OUTPUTS:
        raise Refused(400, f"output must be one of {', '.join(OUTPUTS)}")
    return wanted
