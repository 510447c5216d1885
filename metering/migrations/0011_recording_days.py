"""Recordings name the days of their events, so that a digest finds the late ones without reading old days."""

import django.contrib.postgres.fields
from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("metering", "0010_audit_index")]

    operations = [
        migrations.AddField(
            "recording",
            "event_days",
            django.contrib.postgres.fields.ArrayField(
                base_field=models.DateField(),
                help_text="UTC days of the raw events; unknown of recordings before 0011",
                null=True,
                size=None,
            ),
        ),
    ]
