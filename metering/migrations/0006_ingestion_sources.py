"""Sources of usage by API, and the names of held events that the catalog lacks."""

import django.contrib.postgres.fields
import django.db.models.functions.datetime
from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("metering", "0005_reconciliation"),
    ]

    operations = [
        migrations.CreateModel(
            name="IngestionSource",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("name", models.CharField(max_length=63, unique=True)),
                ("source", models.CharField(help_text="the `source` of its events, a URI reference", max_length=200)),
                ("token_id", models.CharField(help_text="the public part of the token", max_length=16, unique=True)),
                ("token_hash", models.BinaryField(max_length=32)),
                (
                    "tenant_ids",
                    django.contrib.postgres.fields.ArrayField(
                        base_field=models.BigIntegerField(), blank=True, null=True, size=None
                    ),
                ),
                (
                    "provider_ids",
                    django.contrib.postgres.fields.ArrayField(
                        base_field=models.BigIntegerField(), blank=True, null=True, size=None
                    ),
                ),
                (
                    "upstream_ids",
                    django.contrib.postgres.fields.ArrayField(
                        base_field=models.BigIntegerField(), blank=True, null=True, size=None
                    ),
                ),
                ("expires_at", models.DateTimeField(blank=True, null=True)),
                ("revoked_at", models.DateTimeField(blank=True, null=True)),
                (
                    "created_at",
                    models.DateTimeField(db_default=django.db.models.functions.datetime.Now(), editable=False),
                ),
            ],
            options={
                "db_table": "metering_ingestion_source",
                "ordering": ("name",),
            },
        ),
        migrations.AddField(
            model_name="quarantinedevent",
            name="names",
            field=models.JSONField(
                help_text="the names its source used, where the catalog lacks one of them", null=True
            ),
        ),
    ]
