"""Routes of the web process."""

from django.conf import settings
from django.contrib import admin
from django.http import Http404, HttpRequest, HttpResponse
from django.urls import include, path
from django.utils.crypto import constant_time_compare
from django.views.generic import RedirectView

from metering.metrics import render_metrics


def healthz(_: HttpRequest) -> HttpResponse:
    """Say that the process answers; checks nothing behind it."""
    return HttpResponse("ok", content_type="text/plain")


def metrics(request: HttpRequest) -> HttpResponse:
    """Serve Prometheus, to whoever has the token; there is no such page where none is set."""
    if not settings.METRICS_TOKEN:
        raise Http404("set TOLLBOOK_METRICS_TOKEN")
    if not constant_time_compare(request.headers.get("Authorization", ""), f"Bearer {settings.METRICS_TOKEN}"):
        return HttpResponse("a bearer token is needed", status=401, headers={"WWW-Authenticate": "Bearer"})
    return HttpResponse(render_metrics(), content_type="text/plain; version=0.0.4; charset=utf-8")


urlpatterns = [
    path("", RedirectView.as_view(url="/admin/")),
    path("healthz", healthz),
    path("metrics", metrics),
    path("admin/", admin.site.urls),
    path("api/", include("billing.api.urls")),
    path("api/v1/", include("metering.api.urls")),
]
