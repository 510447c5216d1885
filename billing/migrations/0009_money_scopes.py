"""Budgets of single models, and credits; a prepaid tenant needs no monthly budget any more."""

import django.core.validators
import django.db.models.deletion
import django.db.models.functions.datetime
from django.db import migrations, models

GUARDS = """
CREATE TRIGGER refuse_change BEFORE UPDATE OR DELETE OR TRUNCATE ON public.billing_creditpurchase
    FOR EACH STATEMENT EXECUTE FUNCTION public.tollbook_refuse_change();
ALTER TABLE public.billing_creditpurchase ENABLE ALWAYS TRIGGER refuse_change;
"""


class Migration(migrations.Migration):
    dependencies = [
        ("billing", "0008_prepaid_budget"),
    ]

    operations = [
        migrations.CreateModel(
            name="CreditPurchase",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("reference", models.CharField(max_length=100)),
                (
                    "currency",
                    models.CharField(
                        max_length=3,
                        validators=[
                            django.core.validators.RegexValidator("^[A-Z]{3}$", "use an ISO 4217 code, e.g. USD")
                        ],
                    ),
                ),
                ("amount_minor", models.BigIntegerField()),
                ("fee_minor", models.BigIntegerField(default=0, help_text="kept by the payment processor")),
                (
                    "received_in",
                    models.CharField(
                        choices=[("1010", "bank"), ("1051", "Stripe")],
                        help_text="ledger account of the payment",
                        max_length=4,
                    ),
                ),
                ("purchased_on", models.DateField(help_text="accounting day")),
                (
                    "created_at",
                    models.DateTimeField(db_default=django.db.models.functions.datetime.Now(), editable=False),
                ),
            ],
            options={
                "ordering": ("-purchased_on", "-id"),
            },
        ),
        migrations.CreateModel(
            name="ModelBudget",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("monthly_budget_nano", models.PositiveBigIntegerField()),
            ],
            options={
                "ordering": ("tenant", "served_model"),
            },
        ),
        migrations.RemoveConstraint(
            model_name="tenant",
            name="tenant_prepaid_has_budget",
        ),
        migrations.AddField(
            model_name="creditpurchase",
            name="reverses",
            field=models.OneToOneField(
                blank=True,
                null=True,
                on_delete=django.db.models.deletion.PROTECT,
                related_name="reversed_by",
                to="billing.creditpurchase",
            ),
        ),
        migrations.AddField(
            model_name="creditpurchase",
            name="tenant",
            field=models.ForeignKey(
                on_delete=django.db.models.deletion.PROTECT, related_name="credit_purchases", to="billing.tenant"
            ),
        ),
        migrations.AddField(
            model_name="modelbudget",
            name="served_model",
            field=models.ForeignKey(
                on_delete=django.db.models.deletion.PROTECT, related_name="+", to="billing.servedmodel"
            ),
        ),
        migrations.AddField(
            model_name="modelbudget",
            name="tenant",
            field=models.ForeignKey(
                on_delete=django.db.models.deletion.PROTECT, related_name="model_budgets", to="billing.tenant"
            ),
        ),
        migrations.AddConstraint(
            model_name="creditpurchase",
            constraint=models.UniqueConstraint(fields=("tenant", "reference"), name="credit_purchase_once"),
        ),
        migrations.AddConstraint(
            model_name="creditpurchase",
            constraint=models.CheckConstraint(
                condition=models.Q(
                    models.Q(
                        ("amount_minor__gt", 0),
                        ("fee_minor__gte", 0),
                        ("fee_minor__lte", models.F("amount_minor")),
                        ("reverses__isnull", True),
                    ),
                    models.Q(
                        ("amount_minor__lt", 0),
                        ("fee_minor__gte", models.F("amount_minor")),
                        ("fee_minor__lte", 0),
                        ("reverses__isnull", False),
                    ),
                    _connector="OR",
                ),
                name="credit_purchase_sign",
            ),
        ),
        migrations.AddConstraint(
            model_name="modelbudget",
            constraint=models.UniqueConstraint(fields=("tenant", "served_model"), name="model_budget_once"),
        ),
        migrations.AddConstraint(
            model_name="modelbudget",
            constraint=models.CheckConstraint(
                condition=models.Q(("monthly_budget_nano__lte", 9007199254740991)),
                name="model_budget_exact",
                violation_error_message="monthly budget: 9007199 at most",
            ),
        ),
        migrations.RunSQL(GUARDS, migrations.RunSQL.noop),
    ]
