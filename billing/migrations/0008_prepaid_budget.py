"""A prepaid tenant has a monthly budget."""

from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("billing", "0007_exact_limits")]

    operations = [
        migrations.AddConstraint(
            model_name="tenant",
            constraint=models.CheckConstraint(
                condition=models.Q(("is_prepaid", False), ("monthly_budget_nano__isnull", False), _connector="OR"),
                name="tenant_prepaid_has_budget",
                violation_error_message="a prepaid tenant needs a monthly budget: what it has paid for that month",
            ),
        ),
    ]
