"""The audited calls, one in fifty, by themselves: their drift is read without touching the other events."""

from django.db import migrations

CREATE = """
CREATE INDEX metering_usage_event_audit ON metering_usage_event (call_id)
    INCLUDE (provider_id, served_model_id, usage_source, input_tokens, output_tokens, counted_input_tokens,
        counted_output_tokens)
    WHERE counted_input_tokens IS NOT NULL OR counted_output_tokens IS NOT NULL
"""


class Migration(migrations.Migration):
    dependencies = [("metering", "0009_accepted_loss")]

    operations = [migrations.RunSQL(CREATE, "DROP INDEX metering_usage_event_audit")]
