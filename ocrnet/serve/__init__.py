"""`ocrnet serve`: a trained network behind HTTP, with a page for people."""

import sys
import traceback
from collections.abc import Sequence

import ocrnet
from ocrnet import checkpoint, config, exported, flags, layers
from ocrnet.cloud import urls
from ocrnet.errors import OcrnetError
from ocrnet.serve import server, settings
from ocrnet.serve.settings import TOKEN_VARIABLE
from ocrnet.signals import Stopped, StopRequest

# On a CPU a batch saves little time, and what is in it is not rounded as it is alone; see docs/serve.md.
MAX_BATCH = {"CPU": 1}
MAX_BATCH_ELSEWHERE = 8


def main(argv: Sequence[str]) -> int:
    """Serve a checkpoint until a signal ends it."""
    args = flags.parse("serve", argv)
    cfg = layers.build(args.given)
    config.check(cfg)
    without = [name for name in args.given if name not in ("device_target", "engine", "mix")]
    if without:
        raise OcrnetError(f"--set {without[0]}: no effect on serve; each request says how it is looked at")
    for library in ("fastapi", "uvicorn"):
        exported.check_installed(library, "ocrnet serve")
    path, meaning = checkpoint.resolve(flags.required(args, "checkpoint_path"))
    chosen = settings.from_flags(args, max_batch=MAX_BATCH_ELSEWHERE)
    sock = server.bind(chosen.host, chosen.port)  # a port in use is told before weights are read
    with sock, StopRequest(what="finishing what is in work") as stop:
        from ocrnet.serve.app import Service
        from ocrnet.serve.metrics import Metrics
        from ocrnet.serve.network import Network
        from ocrnet.serve.worker import Worker

        model = ocrnet.load(path, engine=cfg.engine, device_target=cfg.device_target, mix=cfg.mix)
        if "max_batch" not in args.options and any(line.startswith("device: CPU") for line in model.decisions):
            chosen = settings.from_flags(args, max_batch=MAX_BATCH["CPU"])
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


def _say_limits(chosen: settings.Settings) -> None:
    batch = f"batches of up to {chosen.max_batch}" if chosen.max_batch > 1 else "one image at a time"
    print(
        f"limits: {chosen.max_megabytes} MB and {chosen.max_megapixels} megapixels an image, {chosen.timeout:g} s, "
        f"{chosen.max_requests} requests at a time; {batch}"
    )
    if chosen.max_batch > 1:
        print("a batch is rounded otherwise than its images alone: labels may differ where two classes are equal")
    print("token: asked for" if chosen.token else f"token: none; {TOKEN_VARIABLE} or --token_file sets one")
    if not chosen.loopback and not chosen.token:
        print(f"warning: whoever reaches {chosen.host} may use this network, without a token", file=sys.stderr)


def _log(error: BaseException) -> None:
    """Tell the operator, not the client, what went wrong."""
    text = "".join(traceback.format_exception(error))
    print(urls.scrub(text), file=sys.stderr, flush=True)
