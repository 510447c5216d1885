"""What the gateway remembers of keys is bounded in count and in bytes, and holds no key that was refused."""

from __future__ import annotations

import http.client
import tracemalloc
from pathlib import Path

import pytest

from gateway.authentication import AUTHORIZATION_BYTES_MAX, REFUSED_MAX, Authenticator
from gateway.errors import GatewayError
from gateway.snapshot_reader import build_catalog
from gateway.upstream import parse_origin
from tests.fakes import gateway_stack
from tests.gateway.conftest import Stack

UNKNOWN = "sk-tb-aaaaaaaaaaaaaaaa-aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
PASSWORD = "passw0rdpassw0rd"


@pytest.fixture
def authenticator() -> Authenticator:
    return Authenticator(gateway_stack.PEPPER.encode())


def refuse(authenticator: Authenticator, authorization: bytes) -> None:
    catalog = build_catalog(gateway_stack.Catalog(version=1).build_snapshot())
    with pytest.raises(GatewayError) as caught:
        authenticator.authenticate(authorization, catalog, now_ms=0)
    assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")


@pytest.mark.parametrize("length", [len("Bearer " + UNKNOWN), AUTHORIZATION_BYTES_MAX, 30_000])
def test_what_is_remembered_of_refused_keys_has_a_fixed_size(authenticator: Authenticator, length: int) -> None:
    catalog = build_catalog(gateway_stack.Catalog(version=1).build_snapshot())
    tracemalloc.start()
    for number in range(REFUSED_MAX + 5_000):
        authorization = f"Bearer {number}".ljust(length, "x").encode()
        with pytest.raises(GatewayError):
            authenticator.authenticate(authorization, catalog, now_ms=0)
    size_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(authenticator._refused) == (REFUSED_MAX if length <= AUTHORIZATION_BYTES_MAX else 0)
    assert all(len(digest) == 32 for digest in authenticator._refused)
    # 65 bytes for a digest, and its place in the dictionary.
    assert size_bytes < REFUSED_MAX * 250


def test_a_refused_key_is_not_kept(authenticator: Authenticator) -> None:
    refuse(authenticator, f"Bearer {UNKNOWN}".encode())
    assert len(authenticator._refused) == 1
    assert UNKNOWN.encode() not in b"".join(authenticator._refused)


def test_a_valid_key_with_padding_is_not_remembered_beyond_the_bound(authenticator: Authenticator) -> None:
    stored = gateway_stack.Catalog(version=1)
    api_key = stored.add_tenant(1)
    catalog = build_catalog(stored.build_snapshot())
    padded = f"Bearer {' ' * AUTHORIZATION_BYTES_MAX}{api_key}".encode()
    with pytest.raises(GatewayError):
        authenticator.authenticate(padded, catalog, now_ms=0)
    assert catalog.verified == {}
    assert authenticator.authenticate(f"Bearer {api_key}".encode(), catalog, now_ms=0).tenant.tenant_id == 1


def test_a_gateway_does_not_grow_by_long_keys(stack: Stack) -> None:
    (pid,) = stack.gateway.list_worker_pids() or [stack.gateway.pid]
    connection = http.client.HTTPConnection("127.0.0.1", stack.gateway.port, timeout=10)

    def ask(count: int, prefix: str) -> None:
        for number in range(count):
            authorization = f"Bearer {prefix}{number}".ljust(30_000, "x")
            connection.request("GET", "/v1/models", headers={"authorization": authorization})
            response = connection.getresponse()
            assert response.status == 401
            response.read()

    ask(200, "warm")
    before = read_resident_bytes(pid)
    ask(3_000, "more")
    connection.close()
    # 90 MB have come in.
    assert read_resident_bytes(pid) - before < 10_000_000


def read_resident_bytes(pid: int) -> int:
    """Return the memory that a process uses now."""
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize(
    "base_url",
    [
        f"ftp://user:{PASSWORD}@host/v1",
        f"http://user:{PASSWORD}@host/v1",
        f"http://user:{PASSWORD[:8]}/{PASSWORD[8:]}@host/v1",
        f"http://user:{PASSWORD}@[host/v1",
        f"http://user:{PASSWORD}@ho\u2100st/v1",
        f"http://host:{PASSWORD}/v1",
        f"http://{PASSWORD}@/v1",
        f"//user:{PASSWORD}@host",
        PASSWORD,
    ],
)
def test_an_error_of_a_base_url_shows_no_part_of_it(base_url: str) -> None:
    with pytest.raises(ValueError, match="the base URL") as caught:
        parse_origin(base_url)
    assert PASSWORD[:8] not in repr(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


def test_a_base_url_without_a_user_is_an_origin() -> None:
    origin = parse_origin("https://host:8443/v1@x?y=a@b")
    assert (origin.host, origin.port, origin.is_tls, origin.host_line) == ("host", 8443, True, b"host: host:8443\r\n")
