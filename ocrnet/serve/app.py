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
from ocrnet.serve.errors import HttpError
from ocrnet.serve.metrics import Metrics
from ocrnet.serve.middleware import INTERNAL_ERROR, Guard
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
TTA_PARAMETERS = ("multi_scale", "flip")
OUTPUTS = ("labels", "overlay", "color", "json")
THREADS = 4  # threads for decoding and encoding; OpenCV and zlib release the GIL


class Service:
    """State shared by the routes; call its methods only from the server's event loop."""

    def __init__(self, network: Network, worker: Worker, metrics: Metrics, settings: Settings) -> None:
        self.network, self.worker, self.metrics, self.settings = network, worker, metrics, settings
        self.reader = request_body.Reader(settings.max_bytes)
        self.pool = ThreadPoolExecutor(THREADS, thread_name_prefix="images")
        self.stopping = False

    async def run_in_pool(self, call: Callable[..., T], *args: Any) -> T:
        """Run a slow function in the thread pool, so that it does not block the event loop; return its result."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, call, *args)

    def check_token(self, headers: Any) -> None:
        """Raise `HttpError` if the server requires a token and the request headers do not contain it."""
        if self.settings.token is None:
            return
        scheme, _, token = headers.get("authorization", "").partition(" ")
        # mutation: compare-token
        if scheme.lower() != "bearer" or not hmac.compare_digest(token.encode(), self.settings.token.encode()):
            raise HttpError(401, "this server requires a token", {"WWW-Authenticate": "Bearer"})

    async def respond(self, request: Any, *, explain: bool, finish: Callable[[Any, Prediction, float], T]) -> T:
        """Read the image of a request, predict it, and return the response that ``finish`` builds.

        Args:
            request: The request, with the image as its body or in a form.
            explain: Whether to predict confidence and relation as well, if the network supports them.
            finish: Builds the response from the image, the prediction and the elapsed seconds; runs in the thread pool.

        Returns:
            The return value of ``finish``.

        Raises:
            HttpError: The request is unauthorized, invalid, too large or too slow, the client disconnected, or the
                server is busy.
        """
        self.check_token(request.headers)
        eval_cfg = _eval_cfg(request.query_params, TTA_PARAMETERS if explain else ("output", *TTA_PARAMETERS))
        if (len(eval_cfg.scales) > 1 or eval_cfg.flip) and not self.network.averages:
            raise HttpError(
                400, "this network outputs only labels, which cannot be averaged; set multi_scale and flip to false"
            )
        # mutation: full-server-reads-no-body
        self.worker.check_capacity()
        with contextlib.ExitStack() as stack:
            async with self.reader.read(request.headers, request.stream().__aiter__()) as data:
                start = time.monotonic()
                header = await self.run_in_pool(request_body.read_header, data, self.settings.max_pixels)
                stack.enter_context(self.worker.reserve(header.pixels))
                image = await self.run_in_pool(request_body.decode, data, header)
            # mutation: free-body-before-inference
            del data  # frees memory during inference; the reader no longer counts these bytes
            remaining = start + self.settings.timeout - time.monotonic()
            prediction = await self._wait(Job(image, eval_cfg, explain), request.receive, remaining)
            return await self.run_in_pool(finish, image, prediction, time.monotonic() - start)

    async def _wait(self, job: Job, receive: Callable[[], Any], seconds: float) -> Prediction:
        """Return the prediction of a job; raise `HttpError` if the client disconnects or ``seconds`` have passed."""
        future = asyncio.wrap_future(self.worker.submit(job))
        disconnect = asyncio.ensure_future(receive())  # the body is complete: the only further message is a disconnect
        try:
            # mutation: time-out-request
            await asyncio.wait({future, disconnect}, timeout=seconds, return_when="FIRST_COMPLETED")
            if future.done():
                return future.result()
            if disconnect.done():
                raise HttpError(499, "the client closed the connection")
            raise HttpError(
                504, f"prediction took longer than {self.settings.timeout:g} seconds", {"Retry-After": "10"}
            )
        finally:
            disconnect.cancel()
            # mutation: cancel-abandoned-request
            job.future.cancel()  # the worker skips a job that is still queued
            # mutation: cancel-abandoned-request
            future.cancel()

    def about(self) -> dict[str, Any]:
        """Return the description of the network and the limits of the server, for /model and the page."""
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
        """Return the gauges of the metrics: {name: (help text, function that returns the current value)}."""
        return {
            "ocrnet_requests_in_work": ("Requests being decoded, waiting or predicted.", lambda: self.worker.requests),
            "ocrnet_waiting": ("Images waiting for the network.", lambda: self.worker.waiting),
        }


def build(service: Service) -> Any:
    """Return the ASGI application."""
    from fastapi import FastAPI
    from fastapi.responses import JSONResponse, Response
    from starlette.requests import ClientDisconnect, Request

    # Documentation pages are off: FastAPI's load scripts from other sites.
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

    @app.post("/predict", openapi_extra=openapi.PREDICT, responses=openapi.predict_responses(), response_model=None)
    async def predict(request: Request) -> Response:
        """Segment an image."""
        output = _output(request)
        model = service.network.model

        def finish(image: Any, prediction: Prediction, seconds: float) -> Response:
            if output == "json":
                return JSONResponse(responses.summary(model, prediction, seconds))
            if output == "overlay":
                return Response(responses.overlay_png(model, image, prediction), media_type="image/png")
            array = prediction.labels if output == "labels" else responses.color_image(model, prediction)
            return Response(responses.png(array), media_type="image/png")

        return await service.respond(request, explain=False, finish=finish)

    @app.post("/explain", openapi_extra=openapi.EXPLAIN, responses=openapi.explain_responses(), response_model=None)
    async def explain(request: Request) -> Response:
        """Segment an image; return labels, confidence and the relation of each pixel to the object regions."""
        compress = "gzip" in request.headers.get("accept-encoding", "")

        def finish(image: Any, prediction: Prediction, seconds: float) -> Response:
            fields = responses.summary(service.network.model, prediction, seconds)
            data = responses.arrays(fields, prediction, compress=compress)
            headers = {"Content-Encoding": "gzip"} if compress else {}
            return Response(data, media_type="application/octet-stream", headers=headers)

        return await service.respond(request, explain=True, finish=finish)

    @app.get("/model", responses=openapi.MODEL_RESPONSES)
    async def model(request: Request) -> dict[str, Any]:
        """Return the classes of the network and the limits of the server."""
        service.check_token(request.headers)
        return service.about()

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> JSONResponse:
        """Return status 200 while the server accepts new requests, and 503 during shutdown."""
        status = "stopping" if service.stopping else "ok"
        return JSONResponse({"status": status}, 503 if service.stopping else 200)

    @app.get("/metrics", responses=openapi.METRICS, response_class=Response)
    async def metrics(request: Request) -> Response:
        """Return the metrics in Prometheus text format."""
        service.check_token(request.headers)
        return Response(service.metrics.text(service.gauges()), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.exception_handler(HttpError)
    async def http_error(request: Request, error: HttpError) -> JSONResponse:
        return JSONResponse({"error": error.text}, error.status, error.headers)

    @app.exception_handler(ClientDisconnect)
    async def client_disconnect(request: Request, error: ClientDisconnect) -> JSONResponse:
        return JSONResponse({"error": "the client closed the connection"}, 499)

    @app.exception_handler(404)
    async def unknown(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": "unknown path; see /openapi.json"}, 404)

    @app.exception_handler(405)
    async def wrong_method(request: Request, error: Exception) -> JSONResponse:
        allow = getattr(error, "headers", None)
        return JSONResponse({"error": "this path does not support this method; see /openapi.json"}, 405, allow)

    @app.exception_handler(Exception)
    async def internal_error(request: Request, error: Exception) -> JSONResponse:  # Guard logs the exception
        return JSONResponse({"error": INTERNAL_ERROR}, 500)

    known = {*PAGE, *app.openapi()["paths"], "/openapi.json"}
    return Guard(app, service.metrics, known, service.settings.hosts)


def _eval_cfg(query: Any, known: Sequence[str]) -> Eval:
    """Return the evaluation settings of a query; raise `HttpError` for a name not in ``known`` or an invalid value."""
    for name in query:
        if name not in known:
            raise HttpError(400, f"unknown parameter '{name[:40]}'; supported: {', '.join(known)}")
    chosen = {}
    for name in TTA_PARAMETERS:
        text = query.get(name, "false").lower()
        if text not in ("true", "false", "1", "0"):
            raise HttpError(400, f"{name} must be true or false")
        chosen[name] = text in ("true", "1")
    return Eval(scales=EVAL_SCALES if chosen["multi_scale"] else (1.0,), flip=chosen["flip"])


def _output(request: Any) -> str:
    """Return the requested output: the parameter ``output``, or else json or labels, depending on the Accept header."""
    accept = request.headers.get("accept", "")
    preferred = "json" if "application/json" in accept and "image/" not in accept else "labels"
    output = request.query_params.get("output", preferred)
    if output not in OUTPUTS:
        raise HttpError(400, f"output must be one of {', '.join(OUTPUTS)}")
    return output
