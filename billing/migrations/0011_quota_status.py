"""Which status a call gets that a budget refuses."""

from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("billing", "0010_key_rotation"),
    ]

    operations = [
        migrations.AddField(
            model_name="tenant",
            name="quota_status_code",
            field=models.PositiveSmallIntegerField(
                choices=[(429, "429, as OpenAI answers"), (402, "402 Payment Required")],
                db_default=429,
                default=429,
                help_text="which status its programs get for a call that a budget or its credits refuse",
                verbose_name="status of a used-up budget",
            ),
        ),
        migrations.AddConstraint(
            model_name="tenant",
            constraint=models.CheckConstraint(
                condition=models.Q(("quota_status_code__in", (429, 402))), name="tenant_quota_status"
            ),
        ),
    ]
