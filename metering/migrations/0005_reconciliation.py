import django.db.models.deletion
import django.db.models.functions.datetime
from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("metering", "0004_corrections"),
    ]

    operations = [
        migrations.CreateModel(
            name="ProviderReport",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                (
                    "state",
                    models.CharField(
                        choices=[("CURRENT", "current"), ("SUPERSEDED", "superseded")], default="CURRENT", max_length=10
                    ),
                ),
                ("provider_id", models.BigIntegerField()),
                ("provider_slug", models.CharField(max_length=200)),
                ("period_start", models.DateField()),
                ("period_end", models.DateField()),
                ("format", models.CharField(max_length=20)),
                (
                    "zone",
                    models.CharField(help_text="of the report's days, and of times without an offset", max_length=64),
                ),
                ("options", models.JSONField(default=dict, help_text="declared columns, renamed models, tolerance")),
                (
                    "tolerance_tokens",
                    models.BigIntegerField(help_text="difference of a call that is none, for input and for output"),
                ),
                ("file_names", models.JSONField()),
                ("files_sha256", models.CharField(max_length=64)),
                ("row_count", models.BigIntegerField(help_text="rows of the period that bill tokens")),
                (
                    "unbilled_row_count",
                    models.BigIntegerField(help_text="rows that bill no tokens: errors, other charges"),
                ),
                ("rejected_row_count", models.BigIntegerField()),
                ("billed_calls", models.BigIntegerField(null=True)),
                ("captured_calls", models.BigIntegerField(null=True)),
                (
                    "exposure_calls",
                    models.BigIntegerField(default=0, help_text="billed attempts that failed; counted as captured"),
                ),
                ("billed_tokens", models.BigIntegerField()),
                ("captured_tokens", models.BigIntegerField()),
                ("exposure_tokens", models.BigIntegerField(default=0)),
                ("recorded_calls", models.BigIntegerField(help_text="of ours in the period, failed ones left out")),
                ("recorded_tokens", models.BigIntegerField()),
                ("finding_counts", models.JSONField(default=dict, help_text="findings by kind")),
                ("imported_by", models.CharField(max_length=150)),
                (
                    "imported_at",
                    models.DateTimeField(db_default=django.db.models.functions.datetime.Now(), editable=False),
                ),
            ],
            options={
                "db_table": "metering_provider_report",
                "ordering": ("-period_start", "provider_slug", "-id"),
                "constraints": [
                    models.UniqueConstraint(
                        condition=models.Q(("state", "CURRENT")),
                        fields=("provider_id", "period_start"),
                        name="metering_provider_report_current",
                    )
                ],
            },
        ),
        migrations.CreateModel(
            name="ReconciliationFinding",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                (
                    "kind",
                    models.CharField(
                        choices=[
                            ("ONLY_BILLED", "billed, not recorded"),
                            ("BILLED_TWICE", "billed twice"),
                            ("ONLY_RECORDED", "recorded, not billed"),
                            ("TOKENS_DIFFER", "tokens differ"),
                            ("SUMS_DIFFER", "sums of a day differ"),
                            ("EXPOSURE", "billed failed attempt"),
                        ],
                        max_length=13,
                    ),
                ),
                ("day", models.DateField(help_text="in the report's zone")),
                ("model", models.CharField(help_text="as the provider names it", max_length=200)),
                ("provider_request_id", models.TextField(blank=True)),
                ("call_id", models.UUIDField(null=True)),
                ("billed_calls", models.BigIntegerField(null=True)),
                ("recorded_calls", models.BigIntegerField(null=True)),
                ("billed_input_tokens", models.BigIntegerField(null=True)),
                ("billed_output_tokens", models.BigIntegerField(null=True)),
                ("recorded_input_tokens", models.BigIntegerField(null=True)),
                ("recorded_output_tokens", models.BigIntegerField(null=True)),
                ("note", models.TextField(blank=True)),
                (
                    "report",
                    models.ForeignKey(
                        on_delete=django.db.models.deletion.PROTECT,
                        related_name="findings",
                        to="metering.providerreport",
                    ),
                ),
            ],
            options={
                "db_table": "metering_reconciliation_finding",
                "ordering": ("report", "id"),
                "indexes": [models.Index(fields=["report", "kind", "id"], name="metering_finding_kind")],
            },
        ),
        migrations.RunSQL(
            """
            CREATE TRIGGER metering_reconciliation_finding_insert_only
                BEFORE UPDATE OR DELETE ON metering_reconciliation_finding
                FOR EACH ROW EXECUTE FUNCTION metering_refuse_change();
            ALTER TABLE metering_reconciliation_finding
                ENABLE ALWAYS TRIGGER metering_reconciliation_finding_insert_only;
            """,
            "DROP TRIGGER metering_reconciliation_finding_insert_only ON metering_reconciliation_finding",
        ),
    ]
