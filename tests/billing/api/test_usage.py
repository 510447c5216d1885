"""Usage by API: grouped, in pages, bounded."""

from datetime import date

import pytest
from django.core.cache import cache

from billing.models import ApiKey
from metering.retention.models import DetachedPartition, ExportedDay

USAGE = "/api/v1/usage"
ASKED = {"start": "2026-10-01", "end": "2026-12-01"}


def test_usage_by_day_and_model(acme):
    page = acme.get(USAGE, ASKED).json()
    assert page.pop("watermark") > 0
    assert page == {
        "next_cursor": None,
        "results": [
            {
                "day": "2026-10-14",
                "served_model": "llama-3-70b-instruct",
                "calls": 1,
                "input_tokens": 1_000_000,
                "cached_input_tokens": 0,
                "cache_write_tokens": 0,
                "output_tokens": 300_000,
                "reasoning_tokens": 0,
            },
            {
                "day": "2026-11-03",
                "served_model": "llama-3-70b-instruct",
                "calls": 1,
                "input_tokens": 2_000_000,
                "cached_input_tokens": 0,
                "cache_write_tokens": 0,
                "output_tokens": 1_000_000,
                "reasoning_tokens": 0,
            },
        ],
    }


def test_days_are_those_of_the_tenants_zone(globex):
    """24 November 03:00 UTC is 11:00 of the same day in Shanghai; 20 October stays too."""
    rows = globex.get(USAGE, ASKED | {"by": "day"}).json()["results"]
    assert [row["day"] for row in rows] == ["2026-10-20", "2026-11-24"]


def test_usage_by_every_dimension(staff):
    asked = ASKED | {"by": "tenant,day,served_model,upstream,api_key,outcome"}
    rows = staff.get(USAGE, asked).json()["results"]
    assert [(row["tenant"], row["day"], row["upstream"], row["outcome"], row["calls"]) for row in rows] == [
        ("acme", "2026-10-14", "bedrock-llama-3-70b", "completed", 1),
        ("acme", "2026-11-03", "bedrock-llama-3-70b", "completed", 1),
        ("globex", "2026-10-20", "bedrock-llama-3-70b", "completed", 1),
        ("globex", "2026-11-24", "bedrock-llama-3-70b", "completed", 1),
    ]


def test_pages_are_stable_and_complete(staff):
    for by in ("tenant,day", "day,tenant,outcome", "outcome,api_key,day", "upstream,provider,day", "served_model,day"):
        whole = staff.get(USAGE, ASKED | {"by": by}).json()["results"]
        rows, cursor = [], {}
        while cursor is not None:
            page = staff.get(USAGE, ASKED | {"by": by, "limit": "1"} | cursor).json()
            assert len(page["results"]) == 1
            rows += page["results"]
            cursor = {"cursor": page["next_cursor"]} if page["next_cursor"] else None
        assert rows == whole
        assert len(rows) == 4


def test_cursor_is_of_its_question(acme, globex):
    asked = ASKED | {"by": "day", "limit": "1"}
    cursor = acme.get(USAGE, asked).json()["next_cursor"]
    assert acme.get(USAGE, asked | {"cursor": cursor}).status_code == 200
    for client, other in (
        (acme, asked | {"by": "day,outcome"}),
        (acme, asked | {"end": "2026-11-30"}),
        (globex, asked),
    ):
        response = client.get(USAGE, other | {"cursor": cursor})
        assert response.status_code == 400
        assert response.json() == {"cursor": ["this is no next_cursor of the same question; start again without it"]}
    assert acme.get(USAGE, asked | {"cursor": "x"}).status_code == 400


@pytest.mark.parametrize(
    ("asked", "calls"),
    [
        ({"served_model": "llama-3-70b-instruct"}, 2),
        ({"provider": "bedrock"}, 2),
        ({"upstream": "bedrock-llama-3-70b"}, 2),
        ({"api_key": "none"}, 2),
        ({"outcome": "completed"}, 2),
        ({"outcome": "client_aborted"}, None),
        ({"label": "team:x", "start": "2026-11-01", "end": "2026-11-08"}, None),
    ],
)
def test_filters(acme, asked, calls):
    rows = acme.get(USAGE, ASKED | {"by": "tenant"} | asked).json()["results"]
    assert [row["calls"] for row in rows] == ([] if calls is None else [calls])


def test_hours_are_of_raw_events(acme):
    asked = {"start": "2026-11-01", "end": "2026-11-08"}
    rows = acme.get(USAGE, asked | {"by": "hour,day"}).json()["results"]
    assert [(row["hour"], row["day"], row["calls"], row["input_tokens"]) for row in rows] == [
        ("2026-11-03T09:00:00Z", "2026-11-03", 1, 2_000_000)
    ]
    assert acme.get(USAGE, asked | {"by": "label.team"}).json()["results"][0]["label.team"] == ""


def test_hours_of_exports_that_are_too_large_are_refused(acme):
    sums = ("input_tokens", "cached_input_tokens", "cache_write_tokens", "output_tokens", "reasoning_tokens")
    facts = dict.fromkeys(("part", "file_bytes", *sums), 1) | {"event_count": 3_000_001}
    export = ExportedDay.objects.create(day=date(2026, 11, 3), path="x", sha256="", content_sha256="", **facts)
    DetachedPartition.objects.create(export=export)
    asked = {"start": "2026-11-01", "end": "2026-11-08", "by": "hour"}
    assert acme.get(USAGE, asked).json() == {
        "start": [
            "the calls of 2026-11-03 are kept in an export, and so many cannot be read now: ask for fewer days, "
            "or by day without hours and labels"
        ]
    }
    assert acme.get(USAGE, asked | {"start": "2026-11-05"}).status_code == 200
    assert acme.get(USAGE, asked | {"by": "day"}).status_code == 200


def test_csv_has_the_same_rows(staff):
    asked = ASKED | {"by": "day,tenant", "format": "csv", "limit": "3"}
    response = staff.get(USAGE, asked, headers={"Accept": "text/csv"})
    assert response["Content-Type"] == "text/csv; charset=utf-8"
    assert response["Content-Disposition"] == 'attachment; filename="usage-2026-10-01-2026-12-01.csv"'
    header = "calls,input_tokens,cached_input_tokens,cache_write_tokens,output_tokens,reasoning_tokens"
    assert response.content.decode().splitlines() == [
        f"day,tenant,{header}",
        "2026-10-14,acme,1,1000000,0,0,300000,0",
        "2026-10-20,globex,1,500000,0,0,100000,0",
        "2026-11-03,acme,1,2000000,0,0,1000000,0",
    ]
    link, _, relation = response["Link"].partition("; ")
    assert relation == 'rel="next"'
    last = staff.get(link.strip("<>"))
    assert last.content.decode().splitlines()[1:] == ["2026-11-24,globex,1,1000000,0,0,0,0"]
    assert "Link" not in last


def test_key_of_another_tenant_is_not_told_apart_from_none(acme, globex):
    key = ApiKey.objects.get(tenant__party__slug="globex").public_id
    answers = [acme.get(USAGE, ASKED | {"api_key": name}) for name in (key, "a" * 16)]
    assert [answer.status_code for answer in answers] == [400, 400]
    assert [answer.json()["api_key"][0].replace(key, "a" * 16) for answer in answers] == [
        "there is no api key 'aaaaaaaaaaaaaaaa'"
    ] * 2


def test_one_credential_is_throttled(acme, globex, settings):
    settings.API_RATE = "2/minute"
    cache.clear()
    assert [client.get(USAGE, ASKED).status_code for client in (acme, acme, acme, globex)] == [200, 200, 429, 200]


def test_staff_ask_for_one_tenant(staff):
    rows = staff.get(USAGE, ASKED | {"by": "tenant", "tenant": "globex"}).json()["results"]
    assert [(row["tenant"], row["calls"]) for row in rows] == [("globex", 2)]
    assert staff.get(USAGE, ASKED | {"tenant": "nobody"}).status_code == 404


def test_tenant_may_name_itself(acme):
    named, own = (acme.get(USAGE, asked).json()["results"] for asked in (ASKED | {"tenant": "acme"}, ASKED))
    assert named == own


def test_tenant_is_not_told_whether_another_exists(acme):
    assert acme.get(USAGE, ASKED | {"tenant": "globex"}).json() == acme.get(USAGE, ASKED | {"tenant": "nobody"}).json()


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"start": "2026-10-01"},
        {"start": "2026-10-02", "end": "2026-10-01"},
        {"start": "2026-10-01", "end": "2026-10-01"},
        {"start": "2025-01-01", "end": "2026-10-01"},
        {"start": "x", "end": "2026-10-01"},
        ASKED | {"by": "colour"},
        ASKED | {"limit": "0"},
        ASKED | {"limit": "10001"},
        ASKED | {"offset": "1"},
        ASKED | {"by": ""},
        ASKED | {"by": "day,"},
        ASKED | {"by": "label.a,label.b"},
        ASKED | {"by": "label."},
        ASKED | {"by": "hour"},
        ASKED | {"label": "team:x"},
        ASKED | {"label": "team"},
        ASKED | {"served_model": "gpt"},
        ASKED | {"format": "xml"},
        ASKED | {"cursor": "%00"},
        {"start": "0001-01-01", "end": "0001-01-02"},
        {"start": "9999-12-30", "end": "9999-12-31"},
        ASKED | {"tenant": "a b"},
    ],
)
def test_question_that_makes_no_sense_is_refused(acme, asked):
    assert acme.get(USAGE, asked).status_code == 400


def test_refusal_names_its_reason(acme):
    asked = {"start": "2026-10-02", "end": "2026-10-01"}
    assert acme.get(USAGE, asked).json() == {"end": ["ask for 1 to 366 days: end is the day after the last one"]}
