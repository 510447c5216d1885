"""The process that counts beside a worker: it is killed, hangs and is flooded, and each question has its end."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from gateway import tokenizer, tokenizer_client
from gateway.tokenizer import TokenizerBusyError, TokenizerUnavailableError, count_text
from gateway.tokenizer_client import (
    PENDING_BYTES_MAX,
    PENDING_COUNT_MAX,
    run_in_tokenizer,
    start_tokenizer,
    stop_tokenizer,
)
from tests.fakes.gateway_stack import MODEL, build_gateway, wait_for_events
from tests.fakes.metrics import read_metrics
from tests.fakes.scripted_upstream import ScriptedUpstream, build_answer, build_chat_body
from tests.fakes.tokenizing import (
    append,
    end_process,
    note_and_wait,
    raise_unreadable,
    raise_value_error,
    read_pid,
    run_with_tokenizer,
    wait_for_file,
)
from tests.gateway.conftest import Stack, wait_for_version


def is_alive(pid: int) -> bool:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return fields[0] not in "ZX"


def wait_until(condition: Callable[[], bool], *, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


async def poll_until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 (another process changes it)
            await asyncio.sleep(0.01)


def list_children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_it_counts_in_another_process_and_answers_in_order() -> None:
    async def ask() -> list[int | None]:
        assert await run_in_tokenizer(read_pid) != os.getpid()
        return await asyncio.gather(*(run_in_tokenizer(count_text, "Hi" * number) for number in range(100)))

    assert run_with_tokenizer(ask()) == [count_text("Hi" * number) for number in range(100)]


def test_what_a_function_raises_comes_back() -> None:
    async def ask() -> int | None:
        with pytest.raises(ValueError, match="no such text"):
            await run_in_tokenizer(raise_value_error)
        with pytest.raises(tokenizer.TokenizerError, match="cannot be read: TypeError"):
            await run_in_tokenizer(raise_unreadable)
        return await run_in_tokenizer(count_text, "Hi")

    assert run_with_tokenizer(ask()) == 1


def test_without_a_process_nothing_is_counted() -> None:
    with pytest.raises(TokenizerUnavailableError, match="no process that counts was started"):
        asyncio.run(run_in_tokenizer(count_text, "Hi"))


def test_the_event_loop_goes_on_while_two_megabytes_are_counted() -> None:
    text = " ".join(map(str, range(280_000)))

    async def count() -> tuple[int | None, list[float]]:
        counting = asyncio.ensure_future(run_in_tokenizer(count_text, text))
        gaps_s = []
        while not counting.done():
            started_at = time.monotonic()
            await asyncio.sleep(0.001)
            gaps_s.append(time.monotonic() - started_at)
        return await counting, gaps_s

    counted, gaps_s = run_with_tokenizer(count())
    # Three digits a token, and the blanks between the numbers.
    assert counted == 1_000 + 2 * 279_000 + 279_999
    assert sum(gaps_s) > 0.1
    assert sorted(gaps_s)[len(gaps_s) * 9 // 10] < 0.05


def test_a_process_killed_over_a_count_is_started_again_and_asked_once_more(tmp_path: Path) -> None:
    log, release = tmp_path / "tries", tmp_path / "release"
    restarts: list[int] = []

    async def ask() -> tuple[str, int | None]:
        await start_tokenizer(lambda: restarts.append(1))
        pid = await run_in_tokenizer(read_pid)
        asked = asyncio.ensure_future(run_in_tokenizer(note_and_wait, str(log), str(release)))
        behind = asyncio.ensure_future(run_in_tokenizer(count_text, "Hi"))
        await poll_until(log.exists)
        os.kill(pid, signal.SIGKILL)
        release.write_text("counted")
        answers = await asked, await behind
        await stop_tokenizer()
        return answers

    assert asyncio.run(ask()) == ("counted", 1)
    assert log.read_text() == "xx"
    assert restarts == [1]


def test_half_an_answer_of_a_dead_process_is_no_part_of_the_next_ones() -> None:
    async def ask() -> int | None:
        pid = await run_in_tokenizer(read_pid)
        client = tokenizer_client._client
        assert client is not None
        client.data_received((10_000).to_bytes(4) + b"the beginning of what was to come")
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(10):
            return await run_in_tokenizer(count_text, "Hi")

    assert run_with_tokenizer(ask()) == 1


def test_a_text_that_ends_the_process_ends_it_twice_and_takes_no_other_with_it(tmp_path: Path) -> None:
    log = tmp_path / "tries"

    async def ask() -> list[object]:
        deadly = asyncio.ensure_future(run_in_tokenizer(end_process, str(log)))
        behind = [asyncio.ensure_future(run_in_tokenizer(count_text, "Hi")) for _ in range(5)]
        answers = await asyncio.gather(deadly, *behind, return_exceptions=True)
        return [*answers, await run_in_tokenizer(count_text, "Hi")]

    deadly, *others = run_with_tokenizer(ask())
    assert isinstance(deadly, TokenizerUnavailableError)
    assert str(deadly) == "the process that counts ended 2 times"
    assert log.read_text() == "xx"
    assert others == [1] * 6


def test_a_process_that_hangs_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_client, "ANSWER_MAX_S", 2.0)

    async def ask() -> tuple[str, int]:
        before = await run_in_tokenizer(read_pid)
        with pytest.raises(TokenizerUnavailableError, match="ended 2 times"):
            await run_in_tokenizer(wait_for_file, str(tmp_path / "never"))
        after = await run_in_tokenizer(read_pid)
        assert not is_alive(before)
        return "replaced", int(before != after)

    assert run_with_tokenizer(ask()) == ("replaced", 1)


def test_a_process_that_does_not_start_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask() -> None:
        monkeypatch.setattr(tokenizer_client.sys, "executable", "/bin/false")
        with pytest.raises(TokenizerUnavailableError, match="ended while it started"):
            await start_tokenizer()
        started_at = time.monotonic()
        with pytest.raises(TokenizerUnavailableError, match="does not start"):
            await run_in_tokenizer(count_text, "Hi")
        assert time.monotonic() - started_at < 0.1
        # It goes on trying.
        monkeypatch.undo()
        deadline = time.monotonic() + 10
        while True:
            try:
                assert await run_in_tokenizer(count_text, "Hi") == 1
                break
            except TokenizerUnavailableError:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.05)
        await stop_tokenizer()

    asyncio.run(ask())


def test_a_program_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_client.sys, "executable", "/nowhere/python")

    async def ask() -> None:
        with pytest.raises(TokenizerUnavailableError, match="ended while it started"):
            await start_tokenizer()
        await stop_tokenizer()

    asyncio.run(ask())


def test_what_waits_is_bounded_in_number_and_bytes(tmp_path: Path) -> None:
    release = tmp_path / "release"

    async def fill(ask_more: Callable[[], Awaitable[object]]) -> None:
        with pytest.raises(TokenizerBusyError):
            await ask_more()
        release.touch()

    async def overload() -> int | None:
        waiting = [
            asyncio.ensure_future(run_in_tokenizer(wait_for_file, str(release))) for _ in range(PENDING_COUNT_MAX)
        ]
        await asyncio.sleep(0)
        await fill(lambda: run_in_tokenizer(count_text, "Hi"))
        assert await asyncio.gather(*waiting) == [""] * PENDING_COUNT_MAX
        release.unlink()
        first = asyncio.ensure_future(run_in_tokenizer(wait_for_file, str(release)))
        large = asyncio.ensure_future(run_in_tokenizer(len, b"x" * (PENDING_BYTES_MAX - 1_000)))
        await asyncio.sleep(0)
        await fill(lambda: run_in_tokenizer(len, b"x" * 1_000))
        assert (await first, await large) == ("", PENDING_BYTES_MAX - 1_000)
        return await run_in_tokenizer(count_text, "Hi")

    assert run_with_tokenizer(overload()) == 1


def test_counts_that_bills_need_come_first(tmp_path: Path) -> None:
    log, release = str(tmp_path / "log"), tmp_path / "release"

    async def ask() -> None:
        pid = await run_in_tokenizer(read_pid)
        running = asyncio.ensure_future(run_in_tokenizer(wait_for_file, str(release), can_wait=True))
        await asyncio.sleep(0)
        waiting = [
            asyncio.ensure_future(run_in_tokenizer(append, log, name, can_wait=name.startswith("text")))
            for name in ("text 1", "bill 1", "text 2", "bill 2", "bill 3")
        ]
        await asyncio.sleep(0)
        waiting[3].cancel()
        release.touch()
        await asyncio.gather(running, *waiting, return_exceptions=True)
        assert await run_in_tokenizer(read_pid) == pid

    run_with_tokenizer(ask())
    assert Path(log).read_text() == "bill 1\nbill 3\ntext 1\ntext 2\n"


PARENT = """
import asyncio, sys
from gateway.tokenizer_client import run_in_tokenizer, start_tokenizer
from tests.fakes.tokenizing import note_and_wait, read_pid

async def main():
    await start_tokenizer()
    print(await run_in_tokenizer(read_pid), flush=True)
    if sys.argv[1:]:
        await run_in_tokenizer(note_and_wait, *sys.argv[1:])
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.parametrize("is_counting", [False, True])
def test_it_ends_with_its_worker_and_by_no_signal_to_stop(tmp_path: Path, is_counting: bool) -> None:
    log = tmp_path / "tries"
    arguments = [str(log), str(tmp_path / "never")] if is_counting else []
    with subprocess.Popen([sys.executable, "-c", PARENT, *arguments], stdout=subprocess.PIPE) as worker:
        assert worker.stdout is not None
        pid = int(worker.stdout.readline())
        if is_counting:
            wait_until(log.exists)
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(pid, number)
        time.sleep(0.1)
        assert is_alive(pid)
        worker.kill()
    wait_until(lambda: not is_alive(pid))


def test_a_gateway_counts_on_after_its_process_was_killed_and_leaves_none_behind(
    stack: Stack, tmp_path: Path, gateway_redis_url: str
) -> None:
    gateway = build_gateway(tmp_path, gateway_redis_url, GATEWAY_AUDIT_PERMILLE="1000")
    gateway.start()
    (worker,) = gateway.list_worker_pids()
    (counting,) = list_children(worker)
    mapped = Path(f"/proc/{worker}/maps").read_text(), Path(f"/proc/{counting}/maps").read_text()
    assert ["tiktoken" in text for text in mapped] == [False, True]
    paris = "The capital of France is Paris."
    body = build_chat_body([paris], input_tokens=11, output_tokens=8)
    upstream = ScriptedUpstream(lambda _request: [build_answer(body)])
    stack.catalog.upstreams.clear()
    stack.catalog.add_upstream(1, upstream.url + "/v1", kind="openai_compatible")
    stack.publish()
    wait_for_version(gateway, stack.catalog.version)
    client = stack.build_client().with_options(base_url=f"{gateway.url}/v1")
    threading.Timer(0.05, os.kill, (counting, signal.SIGKILL)).start()
    for _ in range(100):
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Hi"}])
    wait_until(lambda: not is_alive(counting))
    assert read_metrics(gateway)["tollbook_gateway_tokenizer_restarts_total"] == {(): 1}
    events = wait_for_events(stack.redis, 100)
    assert {(event.counted_input_tokens, event.counted_output_tokens) for event in events} == {(11, 8)}
    (counting,) = list_children(worker)
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: not is_alive(counting))
    wait_until(lambda: gateway.list_worker_pids() not in ([], [worker]))
    (worker,) = gateway.list_worker_pids()
    wait_until(lambda: len(list_children(worker)) == 1)
    (counting,) = list_children(worker)
    assert gateway.stop() == 0
    assert not is_alive(counting)
    upstream.close()
