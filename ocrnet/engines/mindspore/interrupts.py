"""Handling of Ctrl-C that bypasses MindSpore's SIGINT handler.

While MindSpore compiles or runs a graph, it installs its own SIGINT handler, which sends SIGTERM to the process. A
training run would end as if a scheduler had stopped it, and a prediction would end without a message. Therefore SIGINT
is blocked in every thread, and one thread waits for it. That thread sends the main thread another signal, whose handler
calls the SIGINT handler.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_begun = False
_put_off = 0  # the number of active `defer_interrupts` contexts
_waiting = False  # whether an interrupt arrived in such a context


def keep_interrupts() -> None:
    """Install the SIGINT handling once, before MindSpore starts threads; do nothing outside the main thread."""
    global _begun
    if _begun or threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGRTMIN"):
        return
    _begun = True
    instead = signal.SIGRTMIN + 6
    signal.signal(instead, _interrupted)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    main = threading.main_thread().ident
    assert main is not None
    threading.Thread(target=_pass_on, args=(main, instead), daemon=True, name="interrupts").start()


@contextlib.contextmanager
def defer_interrupts() -> Iterator[None]:
    """Defer KeyboardInterrupt to the end: MindSpore's compiler calls Python code and loses exceptions raised in it."""
    global _put_off, _waiting
    _put_off += 1
    try:
        yield
    finally:
        _put_off -= 1
        if _waiting and not _put_off:
            _waiting = False
            raise KeyboardInterrupt


def _pass_on(main: int, instead: int) -> None:
    while True:
        signal.sigwait({signal.SIGINT})
        signal.pthread_kill(main, instead)


def _interrupted(_: int, frame: FrameType | None) -> None:
    global _waiting
    handler = signal.getsignal(signal.SIGINT)
    # mutation: defer-sigint-while-compiling
    if handler is signal.default_int_handler and _put_off and not _waiting:
        _waiting = True
    elif callable(handler) and not _waiting:
        handler(signal.SIGINT, frame)
    elif handler != signal.SIG_IGN:
        os._exit(128 + signal.SIGINT)
