"""The Django application of metering."""

from django.apps import AppConfig


class MeteringConfig(AppConfig):
    """Usage events from the stream to rollups."""

    name = "metering"
    default_auto_field = "django.db.models.BigAutoField"
