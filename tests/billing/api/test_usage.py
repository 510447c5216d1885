"""Usage by API: grouped, in pages, bounded."""

import pytest

USAGE = "/api/v1/usage"
ASKED = {"start": "2026-10-01", "end": "2026-12-01"}


def test_usage_by_day_and_model(acme):
    assert acme.get(USAGE, ASKED).json() == {
        "next_offset": None,
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


def test_pages(staff):
    asked = ASKED | {"by": "tenant,day", "limit": "3"}
    first = staff.get(USAGE, asked).json()
    assert (len(first["results"]), first["next_offset"]) == (3, 3)
    last = staff.get(USAGE, asked | {"offset": "3"}).json()
    assert (len(last["results"]), last["next_offset"]) == (1, None)


def test_staff_ask_for_one_tenant(staff):
    rows = staff.get(USAGE, ASKED | {"by": "tenant", "tenant": "globex"}).json()["results"]
    assert [(row["tenant"], row["calls"]) for row in rows] == [("globex", 2)]
    assert staff.get(USAGE, ASKED | {"tenant": "nobody"}).status_code == 404


def test_tenant_may_name_itself(acme):
    assert acme.get(USAGE, ASKED | {"tenant": "acme"}).json() == acme.get(USAGE, ASKED).json()


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
        ASKED | {"limit": "1001"},
        ASKED | {"offset": "-1"},
        ASKED | {"offset": "99999999999999999999"},
        ASKED | {"tenant": "a b"},
    ],
)
def test_question_that_makes_no_sense_is_refused(acme, asked):
    assert acme.get(USAGE, asked).status_code == 400


def test_refusal_names_its_reason(acme):
    asked = {"start": "2026-10-02", "end": "2026-10-01"}
    assert acme.get(USAGE, asked).json() == {"non_field_errors": ["ask for 1 to 366 days"]}
