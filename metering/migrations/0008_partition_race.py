"""Two recorders that need the partition of one new day at the same moment: the second finds it made."""

from django.db import migrations

# to_regclass answers from a cache that waiting for an advisory lock does not renew, so the second look is a query.
CREATE_PARTITION = """
CREATE OR REPLACE FUNCTION metering_create_event_partition(day date) RETURNS boolean
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
    IF EXISTS (SELECT FROM pg_class WHERE relname = partition_name AND relnamespace = 'public'::regnamespace) THEN
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
"""


class Migration(migrations.Migration):
    dependencies = [("metering", "0007_retention")]

    operations = [migrations.RunSQL(CREATE_PARTITION, migrations.RunSQL.noop)]
