"""`ocrnet serve`: serve a trained network over HTTP, with a web page."""

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from ocrnet import config
from ocrnet.cli import flags
from ocrnet.config import loader
from ocrnet.predict.model import load
from ocrnet.serve import server
from ocrnet.serve.settings import MOST_MEGAPIXELS, SHORTEST_TOKEN, TOKEN_VARIABLE, Settings
from ocrnet.utils import installed, urls
from ocrnet.utils.errors import OcrnetError
from ocrnet.utils.signals import Stopped, StopRequest
from ocrnet.weights import checkpoint

# On a CPU a batch saves little time, and batched and single-image results may differ by rounding; see docs/serve.md.
MAX_BATCH = {"CPU": 1}
MAX_BATCH_ELSEWHERE = 8


def main(argv: Sequence[str]) -> int:
    """Serve a checkpoint over HTTP until a signal stops the process."""
    args = flags.parse("serve", argv)
    cfg = loader.build(args.given)
    config.check(cfg)
    without = [name for name in args.given if name not in ("device_target", "engine", "mix")]
    if without:
        raise OcrnetError(f"--set {without[0]}: no effect on serve; each request sets its own options")
    for library in ("fastapi", "uvicorn"):
        installed.check_installed(library, "ocrnet serve")
    path, meaning = checkpoint.resolve(flags.required(args, "checkpoint_path"))
    chosen = settings_from_flags(args, max_batch=MAX_BATCH_ELSEWHERE)
    sock = server.bind(chosen.host, chosen.port)  # report a port in use before the weights are read
    with sock, StopRequest(message="finishing the requests in progress") as stop:
        from ocrnet.serve.app import Service
        from ocrnet.serve.metrics import Metrics
        from ocrnet.serve.network import Network
        from ocrnet.serve.worker import Worker

        model = load(path, engine=cfg.engine, device_target=cfg.device_target, mix=cfg.mix)
        if "max_batch" not in args.options and any(line.startswith("device: CPU") for line in model.decisions):
            chosen = settings_from_flags(args, max_batch=MAX_BATCH["CPU"])
        for line in [*model.decisions, *([meaning] if meaning else []), f"checkpoint: {path}", *model.notes]:
            print(line)
        metrics, network = Metrics(), Network(model)
        worker = Worker(
            network,
            max_batch=chosen.max_batch,
            batch_wait=chosen.batch_wait,
            max_requests=chosen.max_requests,
            log=_log,
            seen_batch=metrics.batch,
        )
        service = Service(network, worker, metrics, chosen)
        _say_limits(chosen)
        worker.start()
        try:
            server.run(service, sock, stop, lambda: print(f"serving at {server.url(sock)}", flush=True))
        finally:
            worker.close()
            service.pool.shutdown()
        if stop.number:
            raise Stopped(stop.number)
    return 0


def settings_from_flags(args: flags.Args, *, max_batch: int) -> Settings:
    """Return the settings from the command line; without --max_batch, ``max_batch`` applies, the device's default."""
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
        host=args.options.get("host", defaults.host), token=_token(args.options.get("token_file")), **numbers
    )


def _token(path: str | None) -> str | None:
    """Return the token from a file or the environment, not from the command line, which every user can list."""
    given = os.environ.get(TOKEN_VARIABLE)
    if path is not None:
        if given is not None:
            raise OcrnetError(f"--token_file and {TOKEN_VARIABLE} both name a token; keep one")
        try:
            given = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise OcrnetError(f"--token_file {path} cannot be read: {error}") from None
    if given is None:
        return None
    token, source = given.strip(), f"--token_file {path}" if path else TOKEN_VARIABLE
    if len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise OcrnetError(
            f"{source}: a token is one line of at least {SHORTEST_TOKEN} letters, digits and symbols without spaces; "
            "generate one with python -c 'import secrets; print(secrets.token_urlsafe())'"
        )
    return token


def _say_limits(chosen: Settings) -> None:
    batch = f"batches of up to {chosen.max_batch}" if chosen.max_batch > 1 else "one image at a time"
    print(
        f"limits: {chosen.max_megabytes} MB and {chosen.max_megapixels} megapixels an image, {chosen.timeout:g} s, "
        f"{chosen.max_requests} requests at a time; {batch}"
    )
    if chosen.max_batch > 1:
        print("rounding differs between a batch and a single image: labels may differ where two classes tie")
    print("token: required" if chosen.token else f"token: none; {TOKEN_VARIABLE} or --token_file sets one")
    if not chosen.loopback and not chosen.token:
        print(f"warning: anyone who can reach {chosen.host} can use this network without a token", file=sys.stderr)


def _log(error: BaseException) -> None:
    """Print the traceback to stderr for the operator, without secrets; clients do not receive it."""
    text = "".join(traceback.format_exception(error))
    print(urls.scrub(text), file=sys.stderr, flush=True)
