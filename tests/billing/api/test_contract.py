"""The API does what its schema says, whatever it is sent: each operation called by schemathesis through WSGI."""

from __future__ import annotations

import pytest
import schemathesis
from django.conf import settings as django_settings
from django.core.signals import request_finished, request_started
from django.db import close_old_connections
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.core.failures import FailureGroup

from billing.config.wsgi import application
from billing.services.api_keys import issue_api_key
from metering.ingestion_sources import create_ingestion_source
from tests.billing.house import create_staff, log_in

CSRF_TOKEN = "a" * 32
# A list that is too long is refused as such (413), which schemathesis does not expect by itself.
CONFIG = {
    "checks": {"negative_data_rejection": {"expected-statuses": ["400", "401", "403", "404", "413", "415", "422"]}}
}


@pytest.fixture
def one_connection():
    """Requests stay on the connection of the test, as those of Django's own test client do."""
    signals = (request_started, request_finished)
    for signal in signals:
        signal.disconnect(close_old_connections)
    yield
    for signal in signals:
        signal.connect(close_old_connections)


@pytest.fixture
def headers(house, one_connection, settings):
    """What each way of authentication sends: a tenant's key, a superuser's session, a source's token."""
    settings.API_RATE = settings.INGESTION_RATE = "10000/second"
    session = log_in(create_staff("root", is_superuser=True)).cookies[django_settings.SESSION_COOKIE_NAME].value
    return {
        "apiKey": {"Authorization": f"Bearer {issue_api_key('acme', actor_name='test')[1]}"},
        "staffSession": {
            "Cookie": f"{django_settings.SESSION_COOKIE_NAME}={session}; csrftoken={CSRF_TOKEN}",
            "X-CSRFToken": CSRF_TOKEN,
        },
        "sourceToken": {"Authorization": f"Bearer {create_ingestion_source('fuzz', 'urn:fuzz')[1]}"},
    }


def ask_for_november(case):
    """Days in order, and names that there are: what a schema cannot say of a good question."""
    names = {"served_model": "llama-3-70b-instruct", "provider": "bedrock", "upstream": "bedrock-llama-3-70b"}
    known = {"start": "2026-11-01", "end": "2026-11-08", "tenant": "acme", "api_key": "none", "by": "hour,label.a,day"}
    case.query |= {name: value for name, value in (names | known).items() if name in case.query}
    case.query.pop("cursor", None)


def send_as_its_source(case):
    """One event alone: of the source that the token is of, after 1970, with names that there are."""
    if isinstance(case.body, dict):
        case.body |= {"source": "urn:fuzz", "time": "2026-11-23T10:00:00Z", "datacontenttype": "application/json"}
        data = {name: int(value) if type(value) is float else value for name, value in case.body["data"].items()}
        names = {"tenant": "acme", "served_model": "llama-3-70b-instruct", "upstream": "", "provider": ""}
        case.body["data"] = data | names  # 1.0 is an integer to JSON Schema, and a float to us


PREPARE = {"GET /api/v1/usage": ask_for_november, "POST /api/v1/usage-events": send_as_its_source}


def exercise(operation, headers, mode):
    """Call an operation with data of a mode; return what it did that its schema does not say."""

    @settings(max_examples=8, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(operation.as_strategy(generation_mode=mode))
    def call(case):
        if mode == GenerationMode.POSITIVE:
            PREPARE.get(operation.label, lambda _: None)(case)
        case.call_and_validate(headers=headers)

    try:
        call()
    except (FailureGroup, Exception) as error:  # all of them are shown together
        return [f"{operation.label} ({mode.value}): {error}"]
    return []


def test_every_operation_does_what_the_schema_says(headers):
    api = schemathesis.openapi.from_wsgi("/api/schema/", application, config=schemathesis.Config.from_dict(CONFIG))
    operations = [result.ok() for result in api.get_all_operations()]
    assert len(operations) >= 8
    failures = [
        failure
        for operation in operations
        for requirement in operation.definition.raw["security"]
        for scheme in requirement
        for mode in GenerationMode
        for failure in exercise(operation, headers[scheme], mode)
    ]
    assert not failures, "\n\n".join(failures)
