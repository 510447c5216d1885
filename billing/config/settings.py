"""Django settings: environment variables are read here and nowhere else on this side.

Every `TOLLBOOK_*` variable is documented in `deploy/README.md` (a test compares).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import environ
from django.core.exceptions import ImproperlyConfigured

from billing.admin.unfold_settings import UNFOLD  # noqa: F401 (a setting)
from gateway.contract.redis_url import is_cluster_url

BASE_DIR = Path(__file__).resolve().parent.parent.parent
env = environ.Env()

DATA_DIR = Path(os.environ.get("TOLLBOOK_DATA_DIR") or BASE_DIR / ".tollbook")
DEBUG = env.bool("TOLLBOOK_DEBUG", default=False)

# Commands that run before anything is configured: they start the servers, or need none.
WITHOUT_SERVERS = {
    "up",
    "status",
    "demo",
    "makemigrations",
    "help",
    "--help",
    "version",
    "--version",
    "collectstatic",
}
_command = sys.argv[1] if len(sys.argv) > 1 and Path(sys.argv[0]).name == "manage.py" else ""
_needs_servers = bool(_command) and _command not in WITHOUT_SERVERS and "--help" not in sys.argv


def _read_required(name: str, purpose: str) -> str:
    value = os.environ.get(name, "")
    if not value and _needs_servers:
        raise ImproperlyConfigured(
            f"{name} is not set ({purpose}). Start the embedded system with `manage.py up`, "
            f"or set {name} as described in deploy/README.md."
        )
    return value


SECRET_KEY = _read_required("TOLLBOOK_SECRET_KEY", "signs sessions") or "unconfigured-" + os.urandom(16).hex()
API_KEY_PEPPER = _read_required("TOLLBOOK_API_KEY_PEPPER", "keys the hashes of API keys").encode()

# Migrations run as the owner of the tables; the program itself owns none.
_database_url = _read_required("TOLLBOOK_DATABASE_URL", "the PostgreSQL database")
if _command == "migrate":
    _database_url = os.environ.get("TOLLBOOK_OWNER_DATABASE_URL") or _database_url
DATABASES = {
    "default": {
        **(environ.Env.db_url_config(_database_url) if _database_url else {"ENGINE": "django.db.backends.postgresql"}),
        "CONN_HEALTH_CHECKS": True,
        "CONN_MAX_AGE": 60,
        "OPTIONS": {"application_name": f"tollbook {_command or 'web'}"[:63]},
    }
}
REDIS_URL = _read_required("TOLLBOOK_REDIS_URL", "the Redis-protocol server")
BROKER_URL = env.str("TOLLBOOK_BROKER_URL", default="") or REDIS_URL
if is_cluster_url(BROKER_URL):
    raise ImproperlyConfigured(
        "Celery cannot use a Redis Cluster as its broker. Set TOLLBOOK_BROKER_URL to a single Redis-protocol server, "
        "e.g. redis://127.0.0.1:6379/0."
    )

INSTALLED_APPS = [
    "unfold",
    "unfold.contrib.filters",
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.humanize",
    "django.contrib.messages",
    "django.contrib.postgres",
    "django.contrib.sessions",
    "django.contrib.staticfiles",
    "rest_framework",
    "drf_spectacular",
    "drf_spectacular_sidecar",
    "metering",
    "billing",
]
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "whitenoise.middleware.WhiteNoiseMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]
ROOT_URLCONF = "billing.config.urls"
WSGI_APPLICATION = "billing.config.wsgi.application"
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "DIRS": [BASE_DIR / "billing" / "admin" / "templates"],
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ],
        },
    }
]
AUTH_PASSWORD_VALIDATORS = [
    {"NAME": "django.contrib.auth.password_validation.MinimumLengthValidator", "OPTIONS": {"min_length": 12}},
    {"NAME": "django.contrib.auth.password_validation.CommonPasswordValidator"},
]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
LANGUAGE_CODE = "en-us"
FORMAT_MODULE_PATH = "billing.config.formats"
TIME_ZONE = "UTC"
USE_TZ = True

STATIC_URL = "static/"
STATIC_ROOT = DATA_DIR / "static"
STATICFILES_DIRS = [BASE_DIR / "billing" / "admin" / "static"]
WHITENOISE_USE_FINDERS = True

ALLOWED_HOSTS = env.list("TOLLBOOK_ALLOWED_HOSTS", default=["127.0.0.1", "localhost"])
CSRF_TRUSTED_ORIGINS = env.list("TOLLBOOK_TRUSTED_ORIGINS", default=[])
IS_HTTPS = env.bool("TOLLBOOK_HTTPS", default=False)
SESSION_COOKIE_SECURE = CSRF_COOKIE_SECURE = IS_HTTPS
SECURE_HSTS_SECONDS = 31_536_000 if IS_HTTPS else 0
SECURE_CONTENT_TYPE_NOSNIFF = True
X_FRAME_OPTIONS = "DENY"
DATA_UPLOAD_MAX_MEMORY_SIZE = 10 * 1024 * 1024

REST_FRAMEWORK = {
    # Of every endpoint that names no other: a tenant by its key, or staff who may see invoices.
    "DEFAULT_AUTHENTICATION_CLASSES": [
        "billing.api.authentication.ApiKeyAuthentication",
        "billing.api.authentication.StaffSessionAuthentication",
    ],
    "DEFAULT_PERMISSION_CLASSES": ["billing.api.authentication.MayReadBills"],
    "DEFAULT_THROTTLE_CLASSES": ["metering.api.throttles.CredentialThrottle"],
    "DEFAULT_RENDERER_CLASSES": ["rest_framework.renderers.JSONRenderer"],
    # `format` is a parameter of endpoints like any other.
    "URL_FORMAT_OVERRIDE": None,
    "DEFAULT_CONTENT_NEGOTIATION_CLASS": "metering.api.negotiation.JsonNegotiation",
    "EXCEPTION_HANDLER": "metering.api.problems.handle_exception",
    "DEFAULT_SCHEMA_CLASS": "drf_spectacular.openapi.AutoSchema",
    "COERCE_DECIMAL_TO_STRING": True,
}
# Requests of one credential to one web process, as REST framework writes rates.
API_RATE = env.str("TOLLBOOK_API_RATE", default="20/second")
INGESTION_RATE = env.str("TOLLBOOK_INGESTION_RATE", default="100/second")
# What metering asks for the money in its previews (see metering/pricing.py).
METERING_PRICER = "billing.selectors.correction_prices.price_deltas"

SPECTACULAR_SETTINGS = {
    "TITLE": "Tollbook",
    "DESCRIPTION": "Invoices and usage. A tenant calls with one of its API keys and sees what is its own.",
    "VERSION": "1",
    "OAS_VERSION": "3.1.0",
    "POSTPROCESSING_HOOKS": [
        "drf_spectacular.hooks.postprocess_schema_enums",
        "metering.api.usage_event_schema.require_body",
    ],
    "SERVE_INCLUDE_SCHEMA": False,
    "SCHEMA_PATH_PREFIX": "/api/v1",
    # The pages come from the installed package: no other host is ever asked.
    "SWAGGER_UI_DIST": "SIDECAR",
    "SWAGGER_UI_FAVICON_HREF": "SIDECAR",
}

CELERY_BROKER_URL = BROKER_URL
CELERY_TASK_IGNORE_RESULT = True
CELERY_TASK_ACKS_LATE = True
CELERY_TASK_REJECT_ON_WORKER_LOST = True
CELERY_WORKER_PREFETCH_MULTIPLIER = 1
CELERY_TASK_TIME_LIMIT = 600
CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True
CELERY_TIMEZONE = "UTC"

# The web process serves /metrics to whoever has it; without it there is no such page.
METRICS_TOKEN = env.str("TOLLBOOK_METRICS_TOKEN", default="")

# Raw events older than this are exported and taken out of the database, once their months are closed; 0 keeps all.
METERING_RETENTION_DAYS = env.int("TOLLBOOK_METERING_RETENTION_DAYS", default=0)
METERING_EXPORT_DIR = Path(env.str("TOLLBOOK_METERING_EXPORT_DIR", default=str(DATA_DIR / "usage-events")))
if METERING_RETENTION_DAYS and METERING_RETENTION_DAYS < 35:
    raise ImproperlyConfigured(
        f"TOLLBOOK_METERING_RETENTION_DAYS is {METERING_RETENTION_DAYS}: set 35 or more, or 0 to keep all events."
    )

GATEWAY_URL = env.str("TOLLBOOK_GATEWAY_URL", default="")
SANDBOX_URL = env.str("TOLLBOOK_SANDBOX_URL", default="")

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(name)s %(message)s"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
    "root": {"handlers": ["stderr"], "level": env.str("TOLLBOOK_LOG_LEVEL", default="WARNING")},
}
