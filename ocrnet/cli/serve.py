"""`ocrnet serve`: serve a trained network over HTTP, with a web page."""

import logging
import os
import traceback
from collections.abc import Sequence
from pathlib import Path

from ocrnet import config
from ocrnet.cli import flags
from ocrnet.config import loader
from ocrnet.predict.model import load
from ocrnet.serve import server
from ocrnet.serve.settings import MOST_MEGAPIXELS, SHORTEST_TOKEN, TOKEN_VARIABLE, Settings
from ocrnet.utils import installed
from ocrnet.utils.errors import OcrnetError
from ocrnet.utils.signals import Stopped, StopRequest
from ocrnet.weights import checkpoint

logger = logging.getLogger(__name__)

# On a CPU a batch saves little time, and batched and single-image results may differ by rounding; see docs/serve.md.
MAX_BATCH = {"CPU": 1}
MAX_BATCH_ELSEWHERE = 8


def main(argv: Sequence[str]) -> int:
    """Serve a checkpoint or an exported file over HTTP until a signal stops the process."""
    args = flags.parse("serve", argv)
    cfg = loader.build(args.given)
    config.check(cfg)
    unsupported = [name for name in args.given if name not in ("device_target", "engine", "mix")]
    if unsupported:
        raise OcrnetError(f"--set {unsupported[0]}: no effect on serve; each request sets its own options")
    for library in ("fastapi", "uvicorn"):
        installed.check_installed(library, "ocrnet serve")
    path = checkpoint.resolve(flags.required(args, "checkpoint_path"))
    settings = settings_from_flags(args, max_batch=MAX_BATCH_ELSEWHERE)
    sock = server.bind(settings.host, settings.port)  # report a port in use before the weights are read
    with sock, StopRequest(message="finishing the requests in progress") as stop:
        from ocrnet.serve.app import Service
        from ocrnet.serve.metrics import Metrics
        from ocrnet.serve.network import Network
        from ocrnet.serve.worker import Worker

        model = load(path, engine=cfg.engine, device_target=cfg.device_target, mix=cfg.mix)
        if "max_batch" not in args.options and model.device_target == "CPU":
            settings = settings_from_flags(args, max_batch=MAX_BATCH["CPU"])
        metrics, network = Metrics(), Network(model)
        worker = Worker(
            network,
            max_batch=settings.max_batch,
            batch_wait=settings.batch_wait,
            max_requests=settings.max_requests,
            log=_log,
            on_batch=metrics.batch,
        )
        service = Service(network, worker, metrics, settings)
        _log_limits(settings)
        worker.start()
        try:
            server.run(service, sock, stop, lambda: logger.info(f"serving at {server.url(sock)}"))
        finally:
            worker.close()
            service.pool.shutdown()
        if stop.number:
            raise Stopped(stop.number)
    return 0


def settings_from_flags(args: flags.Args, *, max_batch: int) -> Settings:
    """Return the settings from the command line; ``max_batch`` is the default of --max_batch."""
    defaults = Settings(max_batch=max_batch)
    numbers = {
        name: flags.as_number(args, name, getattr(defaults, name))
        for name in ("port", "max_batch", "batch_wait", "max_requests", "timeout", "max_megabytes", "max_megapixels")
    }
    for name in numbers.keys() - {"port", "batch_wait"}:
        if numbers[name] == 0:
            raise OcrnetError(f"--{name} is 0, but must be at least 1")
    if numbers["max_megapixels"] > MOST_MEGAPIXELS:
        raise OcrnetError(f"--max_megapixels is {numbers['max_megapixels']}, but must be at most {MOST_MEGAPIXELS}")
    if numbers["port"] > 65535:
        raise OcrnetError(f"--port is {numbers['port']}, but must be at most 65535; 0 selects a free port")
    return Settings(
        host=args.options.get("host", defaults.host), token=_read_token(args.options.get("token_file")), **numbers
    )


def _read_token(path: str | None) -> str | None:
    """Return the token from a file or the environment; a command line would be visible to other users."""
    text = os.environ.get(TOKEN_VARIABLE)
    if path is not None:
        if text is not None:
            raise OcrnetError(f"--token_file and {TOKEN_VARIABLE} both set a token; keep one")
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise OcrnetError(f"--token_file {path} cannot be read: {error}") from None
    if text is None:
        return None
    token, source = text.strip(), f"--token_file {path}" if path else TOKEN_VARIABLE
    if len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise OcrnetError(
            f"{source}: the token must be one line of at least {SHORTEST_TOKEN} letters, digits and symbols, without "
            "spaces; generate one with python -c 'import secrets; print(secrets.token_urlsafe())'"
        )
    return token


def _log_limits(settings: Settings) -> None:
    batch = f"batches of up to {settings.max_batch}" if settings.max_batch > 1 else "batches of one image"
    logger.info(
        f"limits: {settings.max_megabytes} MB and {settings.max_megapixels} megapixels per image, "
        f"{settings.timeout:g} s per request, {settings.max_requests} simultaneous requests, {batch}"
    )
    if settings.max_batch > 1:
        logger.info(
            "results of a batch and of a single image differ by rounding, so labels may differ where two classes tie"
        )
    logger.info("token: required" if settings.token else f"token: none; set one with {TOKEN_VARIABLE} or --token_file")
    if not settings.loopback and not settings.token:
        logger.warning(f"anyone who can reach {settings.host} can use this network without a token")


def _log(error: BaseException) -> None:
    """Log the traceback; clients do not receive it."""
    logger.error("".join(traceback.format_exception(error)))
