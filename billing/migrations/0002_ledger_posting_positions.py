"""An entry states how many postings it has, and each posting its position among them."""

import django.db.models.deletion
from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("billing", "0001_initial")]

    operations = [
        migrations.AddField(
            model_name="journalentry",
            name="posting_count",
            field=models.PositiveIntegerField(default=2),
            preserve_default=False,
        ),
        migrations.AddConstraint(
            model_name="journalentry",
            constraint=models.CheckConstraint(
                condition=models.Q(("posting_count__gte", 2)), name="journal_entry_two_postings"
            ),
        ),
        migrations.AddField(
            model_name="posting",
            name="position",
            field=models.PositiveIntegerField(default=1, help_text="1 to the entry's posting_count"),
            preserve_default=False,
        ),
        migrations.AlterModelOptions(name="posting", options={"ordering": ("journal_entry", "position")}),
        migrations.AlterField(
            model_name="posting",
            name="journal_entry",
            field=models.ForeignKey(
                db_index=False,
                on_delete=django.db.models.deletion.PROTECT,
                related_name="postings",
                to="billing.journalentry",
            ),
        ),
        migrations.AddConstraint(
            model_name="posting",
            constraint=models.UniqueConstraint(fields=("journal_entry", "position"), name="posting_position_once"),
        ),
    ]
