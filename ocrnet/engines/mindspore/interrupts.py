"""Ctrl-C, kept out of MindSpore's reach.

While it compiles or runs a graph, MindSpore has a SIGINT handler of its own in place, which sends the process SIGTERM:
a run would end as if a scheduler had ended it, and a prediction without a word. So SIGINT is held in every thread, one
thread waits for it, and the main thread gets another signal in its place, whose handler calls the one for SIGINT.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_begun = False
_put_off = 0  # how many `defer_interrupts` are open
_waiting = False  # whether an interrupt came meanwhile


def keep_interrupts() -> None:
    """Begin, once, before MindSpore starts threads of its own; from the main thread, elsewhere nothing is changed."""
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
    """Raise KeyboardInterrupt only at the end: MindSpore's compiler calls Python, and loses what is raised there."""
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
