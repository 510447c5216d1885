"""A running gateway with a catalog and the sandbox upstream, shared by the tests of this folder."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
import redis

from deploy.embedded.redis import EmbeddedRedis
from tests.fakes.gateway_stack import Catalog, ServerProcess, build_gateway, build_sandbox
from tests.fakes.scripted_upstream import ScriptedUpstream, build_answer, build_chat_body


@dataclass
class Stack:
    """Redis, catalog, sandbox and gateway. `api_key` is that of tenant 1."""

    redis: redis.Redis
    catalog: Catalog
    sandbox: ServerProcess
    gateway: ServerProcess
    api_key: str

    def build_client(self, api_key: str | None = None, **options: object) -> openai.OpenAI:
        """Return the official client, pointed at the gateway; no retries unless asked for."""
        return openai.OpenAI(
            base_url=f"{self.gateway.url}/v1", api_key=api_key or self.api_key, **{"max_retries": 0, **options}
        )

    def reset(self) -> None:
        """Back to an empty Redis, the first catalog and no counts in the sandbox."""
        self.redis.flushdb()
        version = self.catalog.version
        self.catalog = Catalog(version=version)
        self.api_key = self.catalog.add_tenant(1)
        self.catalog.add_model()
        self.catalog.add_upstream(1, self.sandbox.url + "/v1")
        self.publish()

    def publish(self) -> None:
        """Publish the catalog and wait until every worker uses it."""
        self.catalog.publish(self.redis)
        wait_for_version(self.gateway, self.catalog.version)


def wait_for_version(gateway: ServerProcess, version: int) -> None:
    """Wait until the gateway's (only) worker uses a catalog version."""
    import time

    deadline = time.monotonic() + 5
    line = f'tollbook_gateway_snapshot_version{{worker="0"}} {version}\n'
    while line not in gateway.fetch("/metrics")[1].decode():
        assert time.monotonic() < deadline, "the gateway did not take the catalog"
        time.sleep(0.005)


@pytest.fixture(scope="session")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    server = build_sandbox(tmp_path_factory.mktemp("sandbox"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def gateway_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gateway")


@pytest.fixture(scope="session")
def gateway_redis_url() -> Iterator[str]:
    """The URL of a Redis-protocol server of the gateway's tests: those of other rooms publish catalogs too."""
    folder = Path(tempfile.mkdtemp(prefix="tollbook-test-"))
    with EmbeddedRedis(folder) as server:
        yield server.url()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def shared_stack(sandbox: ServerProcess, gateway_folder: Path, gateway_redis_url: str) -> Iterator[Stack]:
    url = gateway_redis_url
    gateway = build_gateway(gateway_folder, url, GATEWAY_LEASE_S="2")
    gateway.start()
    with redis.Redis.from_url(url) as client:
        yield Stack(client, Catalog(), sandbox, gateway, "")
    gateway.stop()


@pytest.fixture
def stack(shared_stack: Stack) -> Stack:
    """The running stack, reset."""
    shared_stack.reset()
    return shared_stack


@pytest.fixture
def upstream(stack: Stack) -> Iterator[ScriptedUpstream]:
    """The only upstream of the stack, which says what it is told."""
    chat = build_chat_body(["fine"], input_tokens=11, output_tokens=2)
    upstream = ScriptedUpstream(lambda _request: [build_answer(chat)])
    serve_by(stack, upstream)
    yield upstream
    upstream.close()


def serve_by(stack: Stack, upstream: ScriptedUpstream, **changes: object) -> None:
    """Publish a catalog in which `upstream` is the only one."""
    stack.catalog.upstreams.clear()
    fields = {"kind": "openai_compatible", "has_continuous_usage": False, "provider_model": "their/name", **changes}
    stack.catalog.add_upstream(1, upstream.url + "/v1", **fields)
    stack.publish()
