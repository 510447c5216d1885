"""Kind `azure_ai`."""

import json

from gateway.contract.catalog_snapshot import UpstreamRecord
from gateway.providers import get_provider
from gateway.providers.base import CallRequest, ReportedUsage
from tests.gateway.providers.samples import load_sample

PROVIDER = get_provider("azure_ai")
UPSTREAM = UpstreamRecord(
    upstream_id=1,
    served_model_id=1,
    provider_id=1,
    provider_slug="azure",
    kind="azure_ai",
    base_url="https://r.services.ai.azure.example/models?api-version=2024-05-01-preview",
    provider_model="Meta-Llama-3-8B-Instruct",
)


def test_request():
    call = CallRequest("chat.completions", b'{"model":"m"}', {"model": "m"}, streamed=False, client_asked_usage=False)
    request = PROVIDER.build_request(call, UPSTREAM, "secret")
    assert request.path == "/models/chat/completions?api-version=2024-05-01-preview"
    assert request.headers == [
        (b"content-type", b"application/json"),
        (b"authorization", b"Bearer secret"),
        (b"api-key", b"secret"),
        (b"extra-parameters", b"pass-through"),
    ]
    assert json.loads(request.body) == {"model": "Meta-Llama-3-8B-Instruct"}


def test_answer_and_stream():
    sample = load_sample("azure_ai_inference")
    usage = {"prompt_tokens": 12, "completion_tokens": 3, "total_tokens": 15}
    body = json.dumps({**sample["response"], "usage": usage}).encode()
    assert PROVIDER.parse_response(body, {}, context_tokens_max=8192).usage == ReportedUsage(12, 3)
    # The sample's own zeros are placeholders, and all-zero usage is no usage.
    zeros = json.dumps(sample["response"]).encode()
    assert PROVIDER.parse_response(zeros, {}, context_tokens_max=8192).usage is None
    meter = PROVIDER.open_stream(client_asked_usage=False, context_tokens_max=8192)
    first = b'data: {"choices":[],"prompt_filter_results":[{"prompt_index":0}]}\n\n'
    last = b"data: " + json.dumps({**sample["stream_last_chunk"], "usage": usage}).encode() + b"\n\n"
    assert meter.feed(first + last + b"data: [DONE]\n\n") == first
    assert meter.finish().usage == ReportedUsage(12, 3)
