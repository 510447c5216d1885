"""The receipt of one call from a real gateway, before and after metering has recorded it behind the web process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from django.conf import settings

from billing.services.api_keys import issue_api_key
from billing.services.catalog import publish_catalog
from metering.rolling_up import roll_up
from metering.stream import close_streams
from tests.billing import scenario
from tests.fakes.gateway_stack import ServerProcess, build_gateway, build_sandbox


@pytest.fixture
def api_keys(transactional_db: None, redis_url: str) -> Iterator[dict[str, str]]:
    """The world of the worked call with a second tenant, published; an API key of each tenant."""
    scenario.forget_caches()
    world = scenario.create_world()
    scenario.create_tenant("globex", world.book("usd-list"))
    yield {slug: issue_api_key(slug, actor_name="test")[1] for slug in ("acme", "globex")}
    close_streams()
    scenario.forget_caches()


@pytest.fixture
def gateway(api_keys: dict[str, str], redis_url: str, live_server, tmp_path: Path) -> Iterator[ServerProcess]:
    publish_catalog()
    sandbox = build_sandbox(tmp_path)
    sandbox.start()
    pepper = settings.API_KEY_PEPPER.decode()
    server = build_gateway(tmp_path, redis_url, WEB_URL=live_server.url, API_KEY_PEPPER=pepper, SANDBOX_URL=sandbox.url)
    server.start(path="/readyz")
    yield server
    server.stop()
    sandbox.stop()


def test_a_receipt_is_settled_then_recorded_and_its_tenants_own(
    gateway: ServerProcess, api_keys: dict[str, str]
) -> None:
    client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=api_keys["acme"], max_retries=0)
    answer = client.chat.completions.with_raw_response.create(
        model="llama-3-70b-instruct", messages=[{"role": "user", "content": "Hi"}], user="u1"
    )
    call_id = answer.headers["x-request-id"]

    def get(tenant: str) -> tuple[int, dict]:
        headers = {"authorization": f"Bearer {api_keys[tenant]}"}
        status, body = gateway.fetch(f"/v1/usage/{call_id}", headers=headers)
        return status, json.loads(body)

    status, settled = get("acme")
    assert (status, settled["state"], settled["cost"]["basis"]) == (200, "settled", "estimated")
    assert get("globex")[0] == 404
    roll_up()
    status, recorded = get("acme")
    assert (status, recorded["state"], recorded["cost"]["basis"]) == (200, "recorded", "rated")
    assert get("globex")[0] == 404
    # 11 tokens at 3.00 and 25 at 4.00 USD per 1,000,000: both sides say the same, to the last member.
    assert recorded["cost"]["amount"] == "0.000133"
    assert recorded["tokens"] == {"input": 11, "cached_input": 0, "cache_write": 0, "output": 25, "reasoning": 0}
    assert recorded["labels"] == {"user": "u1"}
    assert recorded | {"state": "settled", "cost": recorded["cost"] | {"basis": "estimated"}} == settled
