"""Losses that a person accepted."""

import django.db.models.deletion
import django.db.models.functions.datetime
from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("metering", "0008_partition_race"),
    ]

    operations = [
        migrations.CreateModel(
            name="AcceptedLoss",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("first_seq", models.BigIntegerField()),
                ("last_seq", models.BigIntegerField(help_text="inclusive")),
                ("reason", models.CharField(max_length=500)),
                ("actor_name", models.CharField(max_length=150)),
                (
                    "accepted_at",
                    models.DateTimeField(db_default=django.db.models.functions.datetime.Now(), editable=False),
                ),
                (
                    "producer",
                    models.ForeignKey(
                        on_delete=django.db.models.deletion.PROTECT, related_name="+", to="metering.producer"
                    ),
                ),
            ],
            options={
                "verbose_name_plural": "accepted losses",
                "db_table": "metering_accepted_loss",
                "ordering": ("-id",),
                "constraints": [
                    models.UniqueConstraint(
                        fields=("producer", "first_seq", "last_seq"), name="metering_accepted_loss_once"
                    ),
                    models.CheckConstraint(
                        condition=models.Q(
                            models.Q(("reason", ""), _negated=True), models.Q(("actor_name", ""), _negated=True)
                        ),
                        name="metering_accepted_loss_who_and_why",
                    ),
                ],
            },
        ),
        migrations.RunSQL(
            """
            CREATE TRIGGER metering_accepted_loss_insert_only BEFORE UPDATE OR DELETE ON metering_accepted_loss
                FOR EACH ROW EXECUTE FUNCTION metering_refuse_change();
            ALTER TABLE metering_accepted_loss ENABLE ALWAYS TRIGGER metering_accepted_loss_insert_only;
            """,
            migrations.RunSQL.noop,
        ),
    ]
