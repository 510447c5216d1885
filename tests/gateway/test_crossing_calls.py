"""Calls that run at the same time: what one of them fails with is no other's business."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

from tests.fakes.gateway_stack import MODEL, NO_HOLDS, read_holds, wait_for_events
from tests.gateway.conftest import Stack

FAULTS = ("http_400", "http_500")
PAIRS_PER_CLIENT = 20
CLIENTS = 3


def ask(connection: http.client.HTTPConnection, stack: Stack, key: str = "", fault: str = "") -> tuple[int, str, bool]:
    """Call; return the status, the code of an error, and whether the answer is a repeated one."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "sandbox": {"fault": fault}}
    headers = {"authorization": f"Bearer {stack.api_key}", "content-type": "application/json"}
    if key:
        headers["idempotency-key"] = key
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    response = connection.getresponse()
    answer = json.loads(response.read())
    code = answer["error"]["code"] if "error" in answer else ""
    return response.status, code, "idempotency-replayed" in response.headers


def send_nonsense(stack: Stack) -> str:
    """Send what is not HTTP; return the code of the error."""
    with socket.create_connection(("127.0.0.1", stack.gateway.port)) as client:
        client.sendall(b"nonsense\r\n\r\n")
        answer = b"".join(iter(lambda: client.recv(65_536), b""))
    return json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"]


def test_calls_have_their_own_answers_while_others_fail(stack: Stack) -> None:
    is_over = threading.Event()

    def open_connection() -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", stack.gateway.port, timeout=30)
        connection.connect()
        # A connection that the gateway drops is not opened anew without a word.
        connection.auto_open = 0
        return connection

    def fail(fault: str) -> list[tuple[int, str, bool]]:
        connection = open_connection()
        answers = []
        while not is_over.is_set():
            answers.append(ask(connection, stack, fault=fault))
        connection.close()
        return answers

    def repeat(client: int) -> list[tuple[int, str, bool]]:
        connection = open_connection()
        keys = [f"{client}-{number}" for number in range(PAIRS_PER_CLIENT) for _twice in range(2)]
        answers = [ask(connection, stack, key) for key in keys]
        connection.close()
        return answers

    log_bytes = len(stack.gateway.read_log())
    with ThreadPoolExecutor() as executor:
        failing = [executor.submit(fail, fault) for fault in FAULTS * 2]
        repeating = [executor.submit(repeat, client) for client in range(CLIENTS)]
        try:
            nonsense = [send_nonsense(stack) for _ in range(10)]
            repeated = [client.result() for client in repeating]
        finally:
            is_over.set()
    first_answers = [(200, "", False), (200, "", True)] * PAIRS_PER_CLIENT
    assert repeated == [first_answers] * CLIENTS
    assert nonsense == ["invalid_http"] * 10
    refused, failed = (set(failing[index].result() + failing[index + 2].result()) for index in range(2))
    assert refused == {(400, "invalid_request_error", False)}
    assert failed == {(500, "upstream_error", False)}
    assert stack.gateway.read_log()[log_bytes:] == ""
    calls_count = PAIRS_PER_CLIENT * CLIENTS + sum(len(client.result()) for client in failing)
    events = wait_for_events(stack.redis, calls_count)
    assert sum(event.outcome == "completed" for event in events) == PAIRS_PER_CLIENT * CLIENTS
    assert read_holds(stack.redis) == NO_HOLDS
