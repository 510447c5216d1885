"""The Celery application: `celery -A billing.config.celery worker`."""

import os
from typing import Any

from celery import Celery
from celery.schedules import crontab

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "billing.config.settings")

app = Celery("tollbook")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks(["metering", "billing"])

BILLING_SCHEDULE: dict[str, dict[str, Any]] = {
    # Prices change by date, and a Redis-protocol server that lost its data needs the catalog again.
    "catalog-republish": {
        "task": "billing.tasks.republish_catalog_task",
        "schedule": 15.0,
        "options": {"expires": 15.0},
    },
    # After the digests of the night.
    "metering-export": {
        "task": "billing.tasks.export_usage_events_task",
        "schedule": crontab(hour=3, minute=45),
        "options": {"expires": 3600.0},
    },
    "billing-accrue": {
        "task": "billing.tasks.accrue_all_task",
        "schedule": crontab(minute="*/10"),
        "options": {"expires": 600.0},
    },
}


@app.on_after_finalize.connect
def set_schedule(sender: Celery, **_: Any) -> None:
    """Tell beat what each room asks for. Late, because tasks may be imported only once Django is set up."""
    from metering.tasks import BEAT_SCHEDULE

    sender.conf.beat_schedule = {**BEAT_SCHEDULE, **BILLING_SCHEDULE}
