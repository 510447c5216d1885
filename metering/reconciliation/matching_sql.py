"""The statements that compare a report with our events, in temporary tables: nothing of a row passes through Python.

`metering_billed` are the report's rows, `metering_recorded` our calls and failed attempts of the provider (attempt 0 is
the call itself), `metering_pair` which belong together.
"""

from __future__ import annotations

TABLES = (
    "metering_billed",
    "metering_recorded",
    "metering_pair",
    "metering_open_row",
    "metering_open_try",
    "metering_cell",
)
DROP_TABLES = f"DROP TABLE IF EXISTS {', '.join(f'pg_temp.{name}' for name in TABLES)}"

CREATE_BILLED = """
CREATE TEMPORARY TABLE metering_billed (
    id bigint, file smallint, line bigint, request_id text, key text, occurred_at timestamptz, day date, model text,
    calls bigint, input_tokens bigint, output_tokens bigint, is_inside boolean
)
"""
COPY_BILLED = """
COPY metering_billed (id, file, line, request_id, key, occurred_at, day, model, calls, input_tokens, output_tokens,
    is_inside) FROM STDIN
"""

# Our calls and failed attempts; `is_exposure` are those that bill no tenant. Models go by the provider's name for them.
CREATE_RECORDED = """
CREATE TEMPORARY TABLE metering_recorded (
    call_id uuid, attempt integer, key text, request_id text, model text, started_at timestamptz,
    ended_at timestamptz, day date, input_tokens bigint, output_tokens bigint, usage_source text, is_exposure boolean,
    is_inside boolean
)
"""
# The OpenAI-compatible modes of some providers (DashScope's) put this in front of their request id.
KEY = "regexp_replace({}, '^chatcmpl-', '')"
_UPSTREAMS = "unnest(%(upstream_ids)s::bigint[], %(models)s::text[]) upstream(id, model)"
_MODEL = "coalesce(upstream.model, 'upstream ' || event.upstream_id)"
_PLACE = """
    (event.occurred_at AT TIME ZONE %(zone)s)::date,
    {input}, {output}, event.usage_source, {is_exposure},
    (event.occurred_at AT TIME ZONE %(zone)s)::date >= %(start)s
        AND (event.occurred_at AT TIME ZONE %(zone)s)::date < %(end)s
"""
# What was corrected counts as corrected; what is void is none of ours.
_CORRECTED = """
LEFT JOIN metering_usage_correction corrected ON corrected.call_id = event.call_id
    AND NOT EXISTS (SELECT FROM metering_usage_correction newer WHERE newer.supersedes_id = corrected.id)
"""
INSERT_CALLS = f"""
INSERT INTO metering_recorded
SELECT event.call_id, 0, {KEY.format("event.provider_request_id")}, event.provider_request_id, {_MODEL},
    event.occurred_at, event.occurred_at + event.total_us * interval '1 microsecond',
    {
    _PLACE.format(
        input="coalesce(corrected.input_tokens, event.input_tokens)",
        output="coalesce(corrected.output_tokens, event.output_tokens)",
        is_exposure="coalesce(corrected.outcome, event.outcome) = 'upstream_error'",
    )
}
FROM {{source}} event LEFT JOIN {_UPSTREAMS} ON upstream.id = event.upstream_id
{_CORRECTED}
WHERE coalesce(corrected.calls, 1) > 0 AND event.provider_id = %(provider_id)s
    AND event.call_id >= %(call_id_min)s AND event.call_id < %(call_id_end)s
"""
# Attempts with tokens that the provider may charge for. The call itself may have gone to another provider.
INSERT_ATTEMPTS = f"""
INSERT INTO metering_recorded
SELECT event.call_id, attempt.number, '', '', upstream.model,
    event.occurred_at, event.occurred_at + event.total_us * interval '1 microsecond',
    {
    _PLACE.format(
        input="(attempt.value ->> 'exposure_input_tokens')::bigint",
        output="(attempt.value ->> 'exposure_output_tokens')::bigint",
        is_exposure="true",
    )
}
FROM {{source}} event
CROSS JOIN LATERAL jsonb_array_elements(event.detail -> 'attempts') WITH ORDINALITY attempt(value, number)
JOIN {_UPSTREAMS} ON upstream.id = (attempt.value ->> 'upstream_id')::bigint
WHERE event.call_id >= %(call_id_min)s AND event.call_id < %(call_id_end)s
    AND jsonb_typeof(event.detail -> 'attempts') = 'array'
    AND (attempt.value ->> 'exposure_input_tokens')::bigint + (attempt.value ->> 'exposure_output_tokens')::bigint > 0
"""

# By request id: the n-th row of an id with our n-th call of it. A call comes before a failed one.
CREATE_PAIRS = """
CREATE TEMPORARY TABLE metering_pair AS
SELECT billed.id, recorded.call_id, recorded.attempt
FROM (
    SELECT id, key, row_number() OVER (PARTITION BY key ORDER BY is_inside DESC, id) AS number
    FROM metering_billed WHERE key <> ''
) billed
JOIN (
    SELECT call_id, attempt, key, row_number() OVER (PARTITION BY key ORDER BY is_exposure, call_id) AS number
    FROM metering_recorded WHERE key <> ''
) recorded USING (key, number)
"""

# What has no request id of the provider (a timeout gives none) is found by model and time.
_MARGIN = "interval '10 seconds'"
CREATE_OPEN = """
CREATE TEMPORARY TABLE metering_open_row AS
SELECT id, model, occurred_at, input_tokens FROM metering_billed billed
WHERE key <> '' AND occurred_at IS NOT NULL AND is_inside
    AND NOT EXISTS (SELECT FROM metering_pair pair WHERE pair.id = billed.id)
    AND NOT EXISTS (SELECT FROM metering_recorded recorded WHERE recorded.key = billed.key);
CREATE TEMPORARY TABLE metering_open_try AS
SELECT call_id, attempt, model, started_at, ended_at, input_tokens FROM metering_recorded recorded
WHERE key = '' AND (attempt > 0 OR NOT is_exposure);
CREATE INDEX ON metering_open_try (model, started_at);
ANALYZE metering_open_row;
ANALYZE metering_open_try
"""
# Each row takes the attempt of its time whose input is nearest; of two rows that take the same one the nearer has it.
PAIR_NEAREST = f"""
WITH nearest AS (
    SELECT DISTINCT ON (attempt.call_id, attempt.attempt) open_row.id, attempt.call_id, attempt.attempt
    FROM metering_open_row open_row
    CROSS JOIN LATERAL (
        SELECT candidate.call_id, candidate.attempt, abs(candidate.input_tokens - open_row.input_tokens) AS distance,
            abs(extract(epoch FROM candidate.started_at - open_row.occurred_at)) AS distance_s
        FROM metering_open_try candidate
        WHERE candidate.model = open_row.model AND candidate.started_at <= open_row.occurred_at + {_MARGIN}
            AND candidate.started_at >= open_row.occurred_at - interval '1 hour'
            AND candidate.ended_at >= open_row.occurred_at - {_MARGIN}
        ORDER BY distance, distance_s, candidate.call_id, candidate.attempt LIMIT 1
    ) attempt
    ORDER BY attempt.call_id, attempt.attempt, attempt.distance, attempt.distance_s, open_row.id
), taken_rows AS (
    DELETE FROM metering_open_row open_row USING nearest WHERE nearest.id = open_row.id
), taken_tries AS (
    DELETE FROM metering_open_try open_try USING nearest
    WHERE (open_try.call_id, open_try.attempt) = (nearest.call_id, nearest.attempt)
)
INSERT INTO metering_pair SELECT id, call_id, attempt FROM nearest
"""
PAIR_ROUNDS_MAX = 50

# Sums of a day and a model: rows without request ids beside those of our calls that no row names.
CREATE_CELLS = """
CREATE TEMPORARY TABLE metering_cell AS
SELECT coalesce(billed.day, recorded.day) AS day, coalesce(billed.model, recorded.model) AS model,
    billed.day IS NOT NULL AS is_billed, billed.calls AS billed_calls,
    coalesce(billed.input, 0) AS billed_input, coalesce(billed.output, 0) AS billed_output,
    coalesce(recorded.calls, 0) AS recorded_calls,
    coalesce(recorded.input, 0) AS recorded_input, coalesce(recorded.output, 0) AS recorded_output,
    coalesce(recorded.exposed_calls, 0) AS exposed_calls,
    coalesce(recorded.exposed_input, 0) AS exposed_input, coalesce(recorded.exposed_output, 0) AS exposed_output
FROM (
    SELECT day, model, CASE WHEN count(calls) = count(*) THEN sum(calls)::bigint END AS calls,
        sum(input_tokens)::bigint AS input, sum(output_tokens)::bigint AS output
    FROM metering_billed WHERE key = '' AND is_inside GROUP BY day, model
) billed
FULL JOIN (
    SELECT day, model, count(*) FILTER (WHERE NOT is_exposure) AS calls,
        coalesce(sum(input_tokens) FILTER (WHERE NOT is_exposure), 0)::bigint AS input,
        coalesce(sum(output_tokens) FILTER (WHERE NOT is_exposure), 0)::bigint AS output,
        count(*) FILTER (WHERE is_exposure AND attempt > 0) AS exposed_calls,
        coalesce(sum(input_tokens) FILTER (WHERE is_exposure AND attempt > 0), 0)::bigint AS exposed_input,
        coalesce(sum(output_tokens) FILTER (WHERE is_exposure AND attempt > 0), 0)::bigint AS exposed_output
    FROM metering_recorded recorded
    WHERE is_inside AND NOT EXISTS (
        SELECT FROM metering_pair pair
        WHERE pair.call_id = recorded.call_id AND pair.attempt = recorded.attempt
    )
    GROUP BY day, model
) recorded ON recorded.day = billed.day AND recorded.model = billed.model
WHERE billed.day IS NOT NULL OR (%(is_sums_only)s AND recorded.calls > 0)
"""

_COLUMNS = (
    "(report_id, kind, day, model, provider_request_id, call_id, billed_calls, recorded_calls, billed_input_tokens,"
    " billed_output_tokens, recorded_input_tokens, recorded_output_tokens, note)"
)
_INSERT = f"INSERT INTO metering_reconciliation_finding {_COLUMNS}"
_PAIRED = """
FROM metering_billed billed JOIN metering_pair pair ON pair.id = billed.id
JOIN metering_recorded recorded ON recorded.call_id = pair.call_id AND recorded.attempt = pair.attempt
WHERE billed.is_inside
"""
FIND_DIFFERENT_TOKENS = f"""
{_INSERT}
SELECT %(report_id)s, 'TOKENS_DIFFER', billed.day, billed.model, billed.request_id, recorded.call_id, 1, 1,
    billed.input_tokens, billed.output_tokens, recorded.input_tokens, recorded.output_tokens,
    concat_ws('; ',
        CASE WHEN recorded.usage_source IN ('estimated', 'counted')
            THEN 'our numbers are ' || recorded.usage_source END,
        CASE WHEN recorded.key = '' THEN 'matched by time' END)
{_PAIRED} AND NOT recorded.is_exposure AND (
    abs(billed.input_tokens - recorded.input_tokens) > %(tolerance)s
    OR abs(billed.output_tokens - recorded.output_tokens) > %(tolerance)s
)
ORDER BY billed.id
"""
FIND_EXPOSURE = f"""
{_INSERT}
SELECT %(report_id)s, 'EXPOSURE', billed.day, billed.model, billed.request_id, recorded.call_id, 1, 0,
    billed.input_tokens, billed.output_tokens, recorded.input_tokens, recorded.output_tokens,
    CASE WHEN recorded.attempt = 0 THEN 'the call failed'
        ELSE 'attempt ' || recorded.attempt || ' failed; matched by time' END
{_PAIRED} AND recorded.is_exposure
ORDER BY billed.id
"""
FIND_ONLY_BILLED = f"""
{_INSERT}
SELECT %(report_id)s, CASE WHEN is_known THEN 'BILLED_TWICE' ELSE 'ONLY_BILLED' END, day, model, request_id,
    NULL, 1, NULL, input_tokens, output_tokens, NULL, NULL,
    format('line %%s of %%s', line, (%(files)s::text[])[file + 1])
FROM (
    SELECT billed.*, EXISTS (SELECT FROM metering_recorded recorded WHERE recorded.key = billed.key) AS is_known
    FROM metering_billed billed
    WHERE key <> '' AND is_inside AND NOT EXISTS (SELECT FROM metering_pair pair WHERE pair.id = billed.id)
) unpaired
ORDER BY id
"""
FIND_ONLY_RECORDED = f"""
{_INSERT}
SELECT %(report_id)s, 'ONLY_RECORDED', day, model, request_id, call_id, NULL, 1, NULL, NULL, input_tokens,
    output_tokens, concat_ws('; ',
        CASE WHEN key = '' THEN 'no request id of the provider was recorded' END,
        CASE WHEN started_at < %(start_at)s + interval '15 minutes' OR ended_at > %(end_at)s - interval '15 minutes'
            THEN 'at the edge of the period: look in the report of the month beside it' END)
FROM metering_recorded recorded
WHERE is_inside AND NOT is_exposure AND NOT %(is_sums_only)s
    AND NOT EXISTS (
        SELECT FROM metering_pair pair WHERE pair.call_id = recorded.call_id AND pair.attempt = recorded.attempt
    )
    AND NOT EXISTS (SELECT FROM metering_cell cell WHERE cell.day = recorded.day AND cell.model = recorded.model)
ORDER BY call_id
"""
# A surplus of a day within what failed attempts exposed us to is explained by them, and no loss.
EXPLAINED_INPUT = "least(greatest(billed_input - recorded_input, 0), exposed_input)"
EXPLAINED_OUTPUT = "least(greatest(billed_output - recorded_output, 0), exposed_output)"
EXPLAINED_CALLS = "coalesce(least(greatest(billed_calls - recorded_calls, 0), exposed_calls), 0)"
FIND_EXPOSED_SUMS = f"""
{_INSERT}
SELECT %(report_id)s, 'EXPOSURE', day, model, '', NULL, {EXPLAINED_CALLS}, 0, {EXPLAINED_INPUT}, {EXPLAINED_OUTPUT},
    exposed_input, exposed_output, format('within the exposure of %%s failed attempts of the day', exposed_calls)
FROM metering_cell WHERE {EXPLAINED_INPUT} + {EXPLAINED_OUTPUT} + {EXPLAINED_CALLS} > 0
ORDER BY day, model
"""
FIND_DIFFERENT_SUMS = f"""
{_INSERT}
SELECT %(report_id)s,
    CASE WHEN NOT is_billed THEN 'ONLY_RECORDED' WHEN recorded_calls = 0 THEN 'ONLY_BILLED' ELSE 'SUMS_DIFFER' END,
    day, model, '', NULL, billed_calls, recorded_calls, CASE WHEN is_billed THEN billed_input END,
    CASE WHEN is_billed THEN billed_output END, recorded_input, recorded_output, 'sums of the day'
FROM metering_cell
WHERE abs(billed_input - {EXPLAINED_INPUT} - recorded_input) > %(tolerance)s * recorded_calls
    OR abs(billed_output - {EXPLAINED_OUTPUT} - recorded_output) > %(tolerance)s * recorded_calls
    OR billed_calls - {EXPLAINED_CALLS} <> recorded_calls
ORDER BY day, model
"""
FINDINGS = (
    *(FIND_ONLY_BILLED, FIND_ONLY_RECORDED, FIND_DIFFERENT_TOKENS, FIND_DIFFERENT_SUMS, FIND_EXPOSURE),
    FIND_EXPOSED_SUMS,
)

# Of a call, captured is our count but not more than was billed: too much here cannot hide too little there.
_CAPTURED_SUM = (
    f"least(billed_input, recorded_input + {EXPLAINED_INPUT})"
    f" + least(billed_output, recorded_output + {EXPLAINED_OUTPUT})"
)
SUM_ALL = f"""
SELECT billed.row_count, CASE WHEN counted_rows > 0 THEN billed.calls END AS billed_calls,
    billed.tokens AS billed_tokens, CASE WHEN counted_rows > 0 THEN paired.calls + cells.calls END AS captured_calls,
    paired.tokens + cells.tokens AS captured_tokens, paired.exposed_calls + cells.exposed_calls AS exposure_calls,
    paired.exposed_tokens + cells.exposed_tokens AS exposure_tokens, recorded.calls AS recorded_calls,
    recorded.tokens AS recorded_tokens
FROM (
    SELECT count(*) AS row_count, count(calls) AS counted_rows, coalesce(sum(calls), 0)::bigint AS calls,
        coalesce(sum(input_tokens + output_tokens), 0)::bigint AS tokens
    FROM metering_billed WHERE is_inside
) billed, (
    SELECT count(*) AS calls,
        coalesce(sum(CASE WHEN recorded.is_exposure THEN billed.input_tokens + billed.output_tokens
            ELSE least(billed.input_tokens, recorded.input_tokens)
                + least(billed.output_tokens, recorded.output_tokens) END), 0)::bigint AS tokens,
        count(*) FILTER (WHERE recorded.is_exposure) AS exposed_calls,
        coalesce(sum(billed.input_tokens + billed.output_tokens) FILTER (WHERE recorded.is_exposure), 0)::bigint
            AS exposed_tokens
    {_PAIRED}
) paired, (
    SELECT coalesce(sum(least(billed_calls, recorded_calls + exposed_calls))
            FILTER (WHERE billed_calls IS NOT NULL), 0)::bigint AS calls,
        coalesce(sum({_CAPTURED_SUM}), 0)::bigint AS tokens,
        coalesce(sum({EXPLAINED_CALLS}), 0)::bigint AS exposed_calls,
        coalesce(sum({EXPLAINED_INPUT} + {EXPLAINED_OUTPUT}), 0)::bigint AS exposed_tokens
    FROM metering_cell WHERE is_billed
) cells, (
    SELECT count(*) AS calls, coalesce(sum(input_tokens + output_tokens), 0)::bigint AS tokens
    FROM metering_recorded WHERE is_inside AND NOT is_exposure
) recorded
"""
