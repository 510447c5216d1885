"""Exports of old days, and the functions that take those days out of the database."""

import django.db.models.deletion
import django.db.models.functions.datetime
from django.db import migrations, models

INSERT_ONLY = "".join(
    f"""
CREATE TRIGGER {table}_insert_only BEFORE UPDATE OR DELETE ON {table}
    FOR EACH ROW EXECUTE FUNCTION metering_refuse_change();
ALTER TABLE {table} ENABLE ALWAYS TRIGGER {table}_insert_only;
"""
    for table in ("metering_exported_day", "metering_detached_partition")
)

# The application owns no table. These functions, the owner's, do for it just this: detach a partition that holds
# exactly what an export says it holds, and drop what was detached so. The schema is the owner's alone.
FUNCTIONS = """
CREATE SCHEMA metering_detached;

CREATE FUNCTION metering_detach_event_partition(wanted_export_id bigint) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    export public.metering_exported_day;
    partition_name text;
    detached_name text;
    detached_parts bigint;
    is_same boolean;
BEGIN
    SELECT * INTO STRICT export FROM public.metering_exported_day WHERE id = wanted_export_id;
    -- Writers of old days hold this lock shared until they commit: none is between its look-up and its insert.
    PERFORM pg_advisory_xact_lock(hashtextextended('metering_event_retention', 0));
    IF EXISTS (SELECT FROM public.metering_detached_partition WHERE export_id = wanted_export_id) THEN
        RETURN true;
    END IF;
    IF export.day >= (now() AT TIME ZONE 'UTC')::date - 35 THEN
        RAISE EXCEPTION 'the day % is too young to be detached', export.day USING ERRCODE = 'check_violation';
    END IF;
    SELECT count(*) INTO detached_parts FROM public.metering_detached_partition detached
        JOIN public.metering_exported_day earlier ON earlier.id = detached.export_id WHERE earlier.day = export.day;
    IF export.part <> detached_parts + 1 THEN
        RAISE EXCEPTION 'part % of % is not the next one', export.part, export.day USING ERRCODE = 'check_violation';
    END IF;
    partition_name := 'metering_usage_event_' || to_char(export.day, 'YYYYMMDD');
    EXECUTE format('LOCK TABLE public.%I IN SHARE MODE', partition_name);
    EXECUTE format(
        'SELECT (count(*), coalesce(sum(input_tokens), 0), coalesce(sum(cached_input_tokens), 0), '
        'coalesce(sum(cache_write_tokens), 0), coalesce(sum(output_tokens), 0), coalesce(sum(reasoning_tokens), 0)) '
        '= ($1, $2, $3, $4, $5, $6) FROM public.%I', partition_name
    ) INTO is_same USING export.event_count, export.input_tokens, export.cached_input_tokens,
        export.cache_write_tokens, export.output_tokens, export.reasoning_tokens;
    IF NOT is_same THEN
        RETURN false;
    END IF;
    detached_name := partition_name || '_' || export.id;
    EXECUTE format('ALTER TABLE public.metering_usage_event DETACH PARTITION public.%I', partition_name);
    EXECUTE format('ALTER TABLE public.%I RENAME TO %I', partition_name, detached_name);
    EXECUTE format('ALTER TABLE public.%I SET SCHEMA metering_detached', detached_name);
    INSERT INTO public.metering_detached_partition (export_id) VALUES (export.id);
    RETURN true;
END $$;

CREATE FUNCTION metering_drop_detached_partition(wanted_export_id bigint) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    detached_name text;
BEGIN
    SELECT 'metering_usage_event_' || to_char(export.day, 'YYYYMMDD') || '_' || export.id INTO STRICT detached_name
        FROM public.metering_exported_day export
        JOIN public.metering_detached_partition detached ON detached.export_id = export.id
        WHERE export.id = wanted_export_id;
    IF to_regclass(format('metering_detached.%I', detached_name)) IS NULL THEN
        RETURN false;
    END IF;
    EXECUTE format('DROP TABLE metering_detached.%I', detached_name);
    RETURN true;
END $$;

REVOKE EXECUTE ON FUNCTION metering_detach_event_partition(bigint), metering_drop_detached_partition(bigint) FROM PUBLIC;
DO $$ BEGIN
    IF EXISTS (SELECT FROM pg_roles WHERE rolname = 'tollbook_app') THEN
        GRANT EXECUTE ON FUNCTION metering_detach_event_partition(bigint), metering_drop_detached_partition(bigint)
            TO tollbook_app;
    END IF;
END $$;
"""

REVERSE = """
DROP FUNCTION metering_drop_detached_partition(bigint);
DROP FUNCTION metering_detach_event_partition(bigint);
DROP SCHEMA metering_detached;
"""


class Migration(migrations.Migration):
    dependencies = [("metering", "0006_ingestion_sources")]

    operations = [
        migrations.CreateModel(
            name="ExportedDay",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("day", models.DateField()),
                ("part", models.SmallIntegerField()),
                ("path", models.CharField(help_text="below the export folder", max_length=200)),
                ("sha256", models.CharField(help_text="of the file", max_length=64)),
                ("file_bytes", models.BigIntegerField()),
                (
                    "content_sha256",
                    models.CharField(help_text="of the events, however they are written down", max_length=64),
                ),
                ("event_count", models.BigIntegerField()),
                ("input_tokens", models.BigIntegerField()),
                ("cached_input_tokens", models.BigIntegerField()),
                ("cache_write_tokens", models.BigIntegerField()),
                ("output_tokens", models.BigIntegerField()),
                ("reasoning_tokens", models.BigIntegerField()),
                (
                    "exported_at",
                    models.DateTimeField(db_default=django.db.models.functions.datetime.Now(), editable=False),
                ),
            ],
            options={
                "db_table": "metering_exported_day",
                "ordering": ("-day", "-part", "-id"),
            },
        ),
        migrations.CreateModel(
            name="DetachedPartition",
            fields=[
                (
                    "export",
                    models.OneToOneField(
                        on_delete=django.db.models.deletion.PROTECT,
                        primary_key=True,
                        related_name="detachment",
                        serialize=False,
                        to="metering.exportedday",
                    ),
                ),
                (
                    "detached_at",
                    models.DateTimeField(db_default=django.db.models.functions.datetime.Now(), editable=False),
                ),
            ],
            options={
                "db_table": "metering_detached_partition",
            },
        ),
        migrations.AddIndex(
            model_name="exportedday",
            index=models.Index(fields=["day"], name="metering_exported_day_day"),
        ),
        migrations.RunSQL(INSERT_ONLY, migrations.RunSQL.noop),
        migrations.RunSQL(FUNCTIONS, REVERSE),
    ]
