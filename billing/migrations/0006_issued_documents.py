import django.db.models.deletion
import django.db.models.functions.datetime
from django.db import migrations, models

# What was issued stays as it was, and is what its hash says.
GUARDS = """
ALTER TABLE public.billing_issueddocument ADD CONSTRAINT issued_document_hash_true
    CHECK (sha256 = encode(sha256(convert_to(canonical_json, 'UTF8')), 'hex'));
CREATE TRIGGER refuse_change BEFORE UPDATE OR DELETE OR TRUNCATE ON public.billing_issueddocument
    FOR EACH STATEMENT EXECUTE FUNCTION public.tollbook_refuse_change();
ALTER TABLE public.billing_issueddocument ENABLE ALWAYS TRIGGER refuse_change;
"""


class Migration(migrations.Migration):
    dependencies = [
        ("billing", "0005_rated_usage"),
    ]

    operations = [
        migrations.CreateModel(
            name="IssuedDocument",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("canonical_json", models.TextField()),
                ("sha256", models.CharField(max_length=64)),
                (
                    "issued_at",
                    models.DateTimeField(db_default=django.db.models.functions.datetime.Now(), editable=False),
                ),
                (
                    "invoice",
                    models.OneToOneField(
                        blank=True,
                        null=True,
                        on_delete=django.db.models.deletion.PROTECT,
                        related_name="issued_document",
                        to="billing.invoice",
                    ),
                ),
                (
                    "statement",
                    models.OneToOneField(
                        blank=True,
                        null=True,
                        on_delete=django.db.models.deletion.PROTECT,
                        related_name="issued_document",
                        to="billing.statement",
                    ),
                ),
            ],
            options={
                "ordering": ("id",),
                "constraints": [
                    models.CheckConstraint(
                        condition=models.Q(
                            models.Q(("invoice__isnull", False), ("statement__isnull", True)),
                            models.Q(("invoice__isnull", True), ("statement__isnull", False)),
                            _connector="OR",
                        ),
                        name="issued_document_of_one",
                    )
                ],
            },
        ),
        migrations.RunSQL(GUARDS, migrations.RunSQL.noop),
    ]
