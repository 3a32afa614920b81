"""Threads that write until a round is over."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager


@contextmanager
def running(writers: Sequence[Callable[[], None]], over: threading.Event) -> Iterator[None]:
    """Run each writer in a thread of its own; at the end of the block set `over` and join them."""
    threads = [threading.Thread(target=writer) for writer in writers]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()
