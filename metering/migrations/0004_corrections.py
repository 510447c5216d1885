"""Corrections of calls, and what may become of a dead letter."""

import django.db.models.deletion
import django.db.models.expressions
import django.db.models.functions.datetime
from django.db import migrations, models

import metering.transaction_ids

# The chain of a call's corrections stays on that call; both tables are insert-only for everyone.
GUARDS = """
ALTER TABLE metering_usage_correction ADD CONSTRAINT metering_correction_chain
    FOREIGN KEY (supersedes_id, call_id) REFERENCES metering_usage_correction (id, call_id);
""" + "".join(
    f"""
CREATE TRIGGER {table}_insert_only BEFORE UPDATE OR DELETE ON {table}
    FOR EACH ROW EXECUTE FUNCTION metering_refuse_change();
ALTER TABLE {table} ENABLE ALWAYS TRIGGER {table}_insert_only;
"""
    for table in ("metering_usage_correction", "metering_correction_delta")
)

# Whatever takes usage off a rollup takes off what is there.
ROLLUP_BOUNDS = """
ALTER TABLE metering_usage_rollup ADD CONSTRAINT metering_usage_rollup_not_negative CHECK (
    calls >= 0 AND cached_input_tokens >= 0 AND cache_write_tokens >= 0 AND reasoning_tokens >= 0
    AND cached_input_tokens + cache_write_tokens <= input_tokens AND reasoning_tokens <= output_tokens
);
"""

REVERSE = """
ALTER TABLE metering_usage_rollup DROP CONSTRAINT metering_usage_rollup_not_negative;
"""


class Migration(migrations.Migration):
    dependencies = [
        ("metering", "0003_digest"),
    ]

    operations = [
        migrations.AddField(
            model_name="deadletter",
            name="mended_body",
            field=models.BinaryField(help_text="what was recorded in place of the bytes, where mended", null=True),
        ),
        migrations.AddField(
            model_name="deadletter",
            name="resolution_note",
            field=models.TextField(blank=True, db_default=""),
        ),
        migrations.AddField(
            model_name="deadletter",
            name="resolved_at",
            field=models.DateTimeField(blank=True, null=True),
        ),
        migrations.AddField(
            model_name="deadletter",
            name="resolved_by",
            field=models.CharField(blank=True, db_default="", max_length=150),
        ),
        migrations.AddField(
            model_name="deadletter",
            name="state",
            field=models.CharField(
                choices=[("HELD", "held"), ("RELEASED", "released: recorded"), ("VOIDED", "voided")],
                db_default="HELD",
                max_length=8,
            ),
        ),
        migrations.AlterField(
            model_name="recording",
            name="kind",
            field=models.CharField(
                choices=[
                    ("STREAM", "stream"),
                    ("IMPORT", "import"),
                    ("API", "API"),
                    ("RELEASE", "release from quarantine"),
                    ("BACKFILL", "backfill"),
                ],
                max_length=10,
            ),
        ),
        migrations.CreateModel(
            name="UsageCorrection",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("idempotency_key", models.CharField(max_length=200, unique=True)),
                (
                    "request_sha256",
                    models.BinaryField(help_text="of what was asked, to tell repeats from reuse", max_length=32),
                ),
                (
                    "kind",
                    models.CharField(
                        choices=[("AMEND", "amend"), ("VOID", "void"), ("BACKFILL", "backfill")], max_length=8
                    ),
                ),
                ("call_id", models.UUIDField()),
                ("occurred_at", models.DateTimeField(help_text="when the call was")),
                ("reason", models.CharField(max_length=500)),
                ("actor_name", models.CharField(max_length=150)),
                (
                    "created_at",
                    models.DateTimeField(db_default=django.db.models.functions.datetime.Now(), editable=False),
                ),
                ("xid", metering.transaction_ids.Xid8Field(db_default=models.Func(function="pg_current_xact_id"))),
                ("tenant_id", models.BigIntegerField()),
                ("usage_on", models.DateField()),
                ("api_key_id", models.BigIntegerField()),
                ("served_model_id", models.BigIntegerField()),
                ("provider_id", models.BigIntegerField()),
                ("upstream_id", models.BigIntegerField()),
                ("outcome", models.CharField(max_length=20)),
                ("calls", models.SmallIntegerField(help_text="0 where the call is void")),
                ("input_tokens", models.IntegerField()),
                ("cached_input_tokens", models.IntegerField()),
                ("cache_write_tokens", models.IntegerField()),
                ("output_tokens", models.IntegerField()),
                ("reasoning_tokens", models.IntegerField()),
                (
                    "supersedes",
                    models.OneToOneField(
                        null=True,
                        on_delete=django.db.models.deletion.PROTECT,
                        related_name="superseded_by",
                        to="metering.usagecorrection",
                    ),
                ),
            ],
            options={
                "db_table": "metering_usage_correction",
                "ordering": ("-id",),
            },
        ),
        migrations.CreateModel(
            name="CorrectionDelta",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("tenant_id", models.BigIntegerField()),
                ("usage_on", models.DateField()),
                ("api_key_id", models.BigIntegerField()),
                ("served_model_id", models.BigIntegerField()),
                ("provider_id", models.BigIntegerField()),
                ("upstream_id", models.BigIntegerField()),
                ("outcome", models.CharField(max_length=20)),
                ("calls", models.SmallIntegerField()),
                ("input_tokens", models.IntegerField()),
                ("cached_input_tokens", models.IntegerField()),
                ("cache_write_tokens", models.IntegerField()),
                ("output_tokens", models.IntegerField()),
                ("reasoning_tokens", models.IntegerField()),
                (
                    "correction",
                    models.ForeignKey(
                        on_delete=django.db.models.deletion.PROTECT,
                        related_name="deltas",
                        to="metering.usagecorrection",
                    ),
                ),
            ],
            options={
                "db_table": "metering_correction_delta",
                "ordering": ("correction", "id"),
            },
        ),
        migrations.AddIndex(
            model_name="usagecorrection",
            index=models.Index(fields=["xid"], name="metering_correction_xid"),
        ),
        migrations.AddConstraint(
            model_name="usagecorrection",
            constraint=models.UniqueConstraint(
                condition=models.Q(("supersedes", None)), fields=("call_id",), name="metering_correction_first"
            ),
        ),
        migrations.AddConstraint(
            model_name="usagecorrection",
            constraint=models.UniqueConstraint(fields=("id", "call_id"), name="metering_correction_of_call"),
        ),
        migrations.AddConstraint(
            model_name="usagecorrection",
            constraint=models.CheckConstraint(
                condition=models.Q(
                    models.Q(("calls", 0), ("input_tokens", 0), ("kind", "VOID"), ("output_tokens", 0)),
                    models.Q(("calls", 1), ("kind", "AMEND")),
                    models.Q(("calls", 1), ("kind", "BACKFILL"), ("supersedes", None)),
                    _connector="OR",
                ),
                name="metering_correction_kind",
            ),
        ),
        migrations.AddConstraint(
            model_name="usagecorrection",
            constraint=models.CheckConstraint(
                condition=models.Q(
                    ("cache_write_tokens__gte", 0),
                    ("cached_input_tokens__gte", 0),
                    (
                        "input_tokens__gte",
                        django.db.models.expressions.CombinedExpression(
                            models.F("cached_input_tokens"), "+", models.F("cache_write_tokens")
                        ),
                    ),
                    ("output_tokens__gte", models.F("reasoning_tokens")),
                    ("reasoning_tokens__gte", 0),
                ),
                name="metering_correction_tokens",
            ),
        ),
        migrations.AddConstraint(
            model_name="usagecorrection",
            constraint=models.CheckConstraint(
                condition=models.Q(
                    models.Q(("reason", ""), _negated=True), models.Q(("actor_name", ""), _negated=True)
                ),
                name="metering_correction_who_and_why",
            ),
        ),
        migrations.AddIndex(
            model_name="correctiondelta",
            index=models.Index(fields=["usage_on"], name="metering_delta_day"),
        ),
        migrations.AddConstraint(
            model_name="correctiondelta",
            constraint=models.UniqueConstraint(
                fields=(
                    "correction",
                    "tenant_id",
                    "usage_on",
                    "api_key_id",
                    "served_model_id",
                    "provider_id",
                    "upstream_id",
                    "outcome",
                ),
                name="metering_delta_once",
            ),
        ),
        migrations.RunSQL(GUARDS + ROLLUP_BOUNDS, REVERSE),
    ]
