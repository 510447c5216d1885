"""The two large tables, as Django cannot say them: partitioned raw events and rollups keyed by their cell.

Both have the tenant in every key, so that they can be distributed by tenant (Citus) as they are.
"""

from django.db import migrations

USAGE_EVENT = """
CREATE TABLE metering_usage_event (
    call_id uuid NOT NULL,
    tenant_id bigint NOT NULL,
    api_key_id bigint NOT NULL,
    served_model_id bigint NOT NULL,
    provider_id bigint NOT NULL,
    upstream_id bigint NOT NULL,
    occurred_at timestamptz NOT NULL,
    recording_id bigint NOT NULL,
    seq bigint NOT NULL,
    total_us bigint NOT NULL,
    first_byte_us bigint,
    producer_id bigint NOT NULL,
    usage_on date NOT NULL,
    input_tokens integer NOT NULL,
    cached_input_tokens integer NOT NULL,
    cache_write_tokens integer NOT NULL,
    output_tokens integer NOT NULL,
    reasoning_tokens integer NOT NULL,
    counted_input_tokens integer,
    counted_output_tokens integer,
    streamed boolean NOT NULL,
    outcome text NOT NULL,
    usage_source text NOT NULL,
    endpoint text NOT NULL,
    region text NOT NULL,
    finish_reason text NOT NULL,
    provider_request_id text NOT NULL,
    detail jsonb,
    PRIMARY KEY (tenant_id, call_id),
    CONSTRAINT metering_usage_event_tokens CHECK (
        cached_input_tokens >= 0 AND cache_write_tokens >= 0 AND reasoning_tokens >= 0
        AND cached_input_tokens + cache_write_tokens <= input_tokens AND reasoning_tokens <= output_tokens
    )
) PARTITION BY RANGE (call_id);
-- The identity of a call, whoever it is of; receipts are found by it. The primary key has the tenant in it and is a
-- tenant's order of time, because a call id begins with its milliseconds. A database distributed by tenant (Citus)
-- must do without this index: call ids are then unique for each tenant.
CREATE UNIQUE INDEX metering_usage_event_call_id ON metering_usage_event (call_id);

CREATE FUNCTION metering_refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'usage events are insert-only: % on % is refused', TG_OP, TG_TABLE_NAME
        USING ERRCODE = 'restrict_violation';
END $$;

-- ALWAYS: session_replication_role = replica does not switch them off. Partitions inherit the row trigger.
CREATE TRIGGER metering_usage_event_insert_only BEFORE UPDATE OR DELETE ON metering_usage_event
    FOR EACH ROW EXECUTE FUNCTION metering_refuse_change();
ALTER TABLE metering_usage_event ENABLE ALWAYS TRIGGER metering_usage_event_insert_only;
CREATE TRIGGER metering_usage_event_no_truncate BEFORE TRUNCATE ON metering_usage_event
    FOR EACH STATEMENT EXECUTE FUNCTION metering_refuse_change();
ALTER TABLE metering_usage_event ENABLE ALWAYS TRIGGER metering_usage_event_no_truncate;
"""

# The application owns no table, so the owner's function makes the partitions for it. The table is made aside and
# attached: ATTACH lets readers and writers of other days go on, CREATE … PARTITION OF would stop them.
CREATE_PARTITION = """
CREATE FUNCTION metering_create_event_partition(day date) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    partition_name text := 'metering_usage_event_' || to_char(day, 'YYYYMMDD');
    lower_bound text;
    upper_bound text;
BEGIN
    IF day < (now() AT TIME ZONE 'UTC')::date - 402 OR day > (now() AT TIME ZONE 'UTC')::date + 60 THEN
        RAISE EXCEPTION 'no partition for % : too far from today', day USING ERRCODE = 'check_violation';
    END IF;
    IF to_regclass('public.' || partition_name) IS NOT NULL THEN
        RETURN false;
    END IF;
    PERFORM pg_advisory_xact_lock(hashtextextended('metering_create_event_partition', 0));
    IF to_regclass('public.' || partition_name) IS NOT NULL THEN
        RETURN false;
    END IF;
    lower_bound := lpad(to_hex((extract(epoch FROM day::timestamp) * 1000)::bigint), 12, '0') || repeat('0', 20);
    upper_bound := lpad(to_hex((extract(epoch FROM (day + 1)::timestamp) * 1000)::bigint), 12, '0')
        || repeat('0', 20);
    EXECUTE format(
        'CREATE TABLE public.%I (LIKE public.metering_usage_event INCLUDING DEFAULTS INCLUDING CONSTRAINTS)',
        partition_name
    );
    EXECUTE format(
        'ALTER TABLE public.metering_usage_event ATTACH PARTITION public.%I FOR VALUES FROM (%L) TO (%L)',
        partition_name, lower_bound::uuid, upper_bound::uuid
    );
    EXECUTE format(
        'CREATE TRIGGER metering_usage_event_no_truncate BEFORE TRUNCATE ON public.%I '
        'FOR EACH STATEMENT EXECUTE FUNCTION public.metering_refuse_change()', partition_name
    );
    EXECUTE format('ALTER TABLE public.%I ENABLE ALWAYS TRIGGER metering_usage_event_no_truncate', partition_name);
    RETURN true;
END $$;
REVOKE EXECUTE ON FUNCTION metering_create_event_partition(date) FROM PUBLIC;
DO $$ BEGIN
    IF EXISTS (SELECT FROM pg_roles WHERE rolname = 'tollbook_app') THEN
        GRANT EXECUTE ON FUNCTION metering_create_event_partition(date) TO tollbook_app;
    END IF;
END $$;
"""

# Rows are updated with every batch: half-empty pages keep the new versions beside the old (HOT updates).
USAGE_ROLLUP = """
CREATE TABLE metering_usage_rollup (
    id bigint NOT NULL GENERATED BY DEFAULT AS IDENTITY,
    tenant_id bigint NOT NULL,
    usage_on date NOT NULL,
    api_key_id bigint NOT NULL,
    served_model_id bigint NOT NULL,
    provider_id bigint NOT NULL,
    upstream_id bigint NOT NULL,
    outcome text NOT NULL,
    calls bigint NOT NULL,
    input_tokens bigint NOT NULL,
    cached_input_tokens bigint NOT NULL,
    cache_write_tokens bigint NOT NULL,
    output_tokens bigint NOT NULL,
    reasoning_tokens bigint NOT NULL,
    PRIMARY KEY (tenant_id, usage_on, api_key_id, served_model_id, provider_id, upstream_id, outcome)
) WITH (fillfactor = 50);
CREATE INDEX metering_usage_rollup_day ON metering_usage_rollup (usage_on);
CREATE INDEX metering_usage_rollup_id ON metering_usage_rollup (id);
"""

# Insert-only for everyone, like the events they explain.
INSERT_ONLY = "".join(
    f"""
CREATE TRIGGER {table}_insert_only BEFORE UPDATE OR DELETE ON {table}
    FOR EACH ROW EXECUTE FUNCTION metering_refuse_change();
ALTER TABLE {table} ENABLE ALWAYS TRIGGER {table}_insert_only;
"""
    for table in (
        "metering_recording",
        "metering_superseded_event",
        "metering_conflicting_event",
        "metering_catalog_snapshot",
    )
)

REVERSE = """
DROP TABLE metering_usage_rollup;
DROP FUNCTION metering_create_event_partition(date);
DROP TABLE metering_usage_event;
DROP FUNCTION metering_refuse_change() CASCADE;
"""


class Migration(migrations.Migration):
    dependencies = [("metering", "0001_initial")]

    operations = [
        migrations.RunSQL(USAGE_EVENT + CREATE_PARTITION + USAGE_ROLLUP + INSERT_ONLY, REVERSE),
    ]
