"""A counting process for tests without a gateway, and functions that misbehave in it."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from gateway import tokenizer
from gateway.tokenizer_client import start_tokenizer, stop_tokenizer


def run_with_tokenizer[T](main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end, beside a counting process."""

    async def run() -> T:
        await start_tokenizer()
        try:
            return await main
        finally:
            await stop_tokenizer()

    return asyncio.run(run())


def read_pid() -> int:
    """The process in which this runs."""
    return os.getpid()


def end_process(log: str) -> None:
    """End the process, as a text that the tokenizer cannot stand; each try leaves a byte in the file `log`."""
    with Path(log).open("a") as tries:
        tries.write("x")
    os._exit(7)


def wait_for_file(path: str) -> str:
    """Return the text of a file when it is there."""
    while not Path(path).exists():
        time.sleep(0.01)
    return Path(path).read_text()


def note_and_wait(log: str, path: str) -> str:
    """Leave a byte in the file `log`, then do as `wait_for_file`."""
    with Path(log).open("a") as tries:
        tries.write("x")
    return wait_for_file(path)


def append(path: str, text: str) -> None:
    """Add a line to a file: who runs after whom."""
    with Path(path).open("a") as file:
        file.write(text + "\n")


def lose_ranks() -> None:
    """Have the process look for its ranks again, and not find those it wants."""
    tokenizer.RANKS_SHA256 = ""
    tokenizer._read_encoding.cache_clear()


class UnreadableError(Exception):
    """It can be pickled, and not be read again."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(one + two)


def raise_unreadable() -> None:
    raise UnreadableError(1, 2)


def raise_value_error() -> None:
    raise ValueError("no such text")
