"""The OpenAPI schema says what the API does, and its page asks no other host."""

import yaml
from drf_spectacular.generators import SchemaGenerator
from drf_spectacular.validation import validate_schema


def test_schema_is_valid_and_complete(client, db, recwarn):
    response = client.get("/api/schema/")
    assert response.status_code == 200
    schema = yaml.safe_load(response.content)
    validate_schema(schema)
    assert {path: set(item) for path, item in schema["paths"].items()} == {
        "/api/v1/invoices": {"get"},
        "/api/v1/invoices/{number}": {"get"},
        "/api/v1/invoices/{number}/{extension}": {"get"},
        "/api/v1/usage": {"get"},
        "/api/v1/usage-corrections": {"get", "post"},
        "/api/v1/usage-corrections/preview": {"post"},
        "/api/v1/usage-events/{call_id}": {"get"},
        "/api/v1/usage-events": {"post"},
    }
    assert schema["paths"].pop("/api/v1/usage-events")["post"]["security"] == [{"sourceToken": []}]
    for operation in (one for item in schema["paths"].values() for one in item.values()):
        assert operation["security"] == [{"apiKey": []}, {"staffSession": []}]
    parameters = {one["name"] for one in schema["paths"]["/api/v1/usage"]["get"]["parameters"]}
    assert parameters == {
        *("start", "end", "by", "format", "limit", "cursor"),
        *("tenant", "served_model", "provider", "upstream", "api_key", "outcome", "label"),
    }


def test_generator_has_nothing_to_complain_about(capsys):
    SchemaGenerator().get_schema(public=True)
    assert capsys.readouterr().err == ""


def test_page_is_served_from_here(client, db):
    page = client.get("/api/docs/").content.decode()
    assert "swagger-ui" in page
    assert "//" not in page.replace("http://testserver", "").split("<body>")[0].split("<head>")[1]
