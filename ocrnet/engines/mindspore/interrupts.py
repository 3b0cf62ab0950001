"""Handling of Ctrl-C (SIGINT) that bypasses MindSpore's SIGINT handler.

While MindSpore compiles or runs a graph, it installs its own SIGINT handler, which sends SIGTERM to the process. With
it, Ctrl-C would stop a training run like a SIGTERM from a job scheduler, and end a prediction without a message.
Therefore SIGINT is blocked in every thread, and one thread waits for it. That thread sends a substitute signal to the
main thread, and the handler of this signal calls Python's SIGINT handler.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_installed = False
_deferrals = 0  # the number of active `defer_interrupts` contexts
_pending = False  # whether an interrupt arrived in such a context


def install_interrupt_handling() -> None:
    """Install this handling once, before MindSpore starts threads; do nothing if called outside the main thread."""
    global _installed
    if _installed or threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGRTMIN"):
        return
    _installed = True
    substitute = signal.SIGRTMIN + 6
    signal.signal(substitute, _handle_interrupt)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    main = threading.main_thread().ident
    assert main is not None
    threading.Thread(target=_forward_interrupts, args=(main, substitute), daemon=True, name="interrupts").start()


@contextlib.contextmanager
def defer_interrupts() -> Iterator[None]:
    """Raise KeyboardInterrupt only at the end of the context: MindSpore's compiler loses Python exceptions."""
    global _deferrals, _pending
    _deferrals += 1
    try:
        yield
    finally:
        _deferrals -= 1
        if _pending and not _deferrals:
            _pending = False
            raise KeyboardInterrupt


def _forward_interrupts(main: int, substitute: int) -> None:
    while True:
        signal.sigwait({signal.SIGINT})
        signal.pthread_kill(main, substitute)


def _handle_interrupt(_: int, frame: FrameType | None) -> None:
    global _pending
    handler = signal.getsignal(signal.SIGINT)
    # mutation: defer-sigint-while-compiling
    if handler is signal.default_int_handler and _deferrals and not _pending:
        _pending = True
    elif callable(handler) and not _pending:
        handler(signal.SIGINT, frame)
    elif handler != signal.SIG_IGN:
        os._exit(128 + signal.SIGINT)
