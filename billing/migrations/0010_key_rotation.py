"""Keys that follow others."""

import django.db.models.deletion
from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("billing", "0009_money_scopes"),
    ]

    operations = [
        migrations.AddField(
            model_name="apikey",
            name="overlap_s",
            field=models.PositiveIntegerField(editable=False, help_text="asked for when it was rotated", null=True),
        ),
        migrations.AddField(
            model_name="apikey",
            name="rotated_from",
            field=models.ForeignKey(
                blank=True,
                editable=False,
                null=True,
                on_delete=django.db.models.deletion.PROTECT,
                related_name="successors",
                to="billing.apikey",
            ),
        ),
        migrations.AddField(
            model_name="apikey",
            name="rotation_key",
            field=models.CharField(blank=True, editable=False, help_text="idempotency key", max_length=100),
        ),
        migrations.AddConstraint(
            model_name="apikey",
            constraint=models.UniqueConstraint(
                condition=models.Q(("revoked_at", None)), fields=("rotated_from",), name="api_key_one_live_successor"
            ),
        ),
        migrations.AddConstraint(
            model_name="apikey",
            constraint=models.UniqueConstraint(
                condition=models.Q(("rotation_key", ""), _negated=True),
                fields=("rotated_from", "rotation_key"),
                name="api_key_rotated_once",
            ),
        ),
    ]
