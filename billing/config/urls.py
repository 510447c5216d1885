"""Routes of the web process."""

from django.contrib import admin
from django.http import HttpRequest, HttpResponse
from django.urls import include, path
from django.views.generic import RedirectView


def healthz(_: HttpRequest) -> HttpResponse:
    """Say that the process answers; checks nothing behind it."""
    return HttpResponse("ok", content_type="text/plain")


urlpatterns = [
    path("", RedirectView.as_view(url="/admin/")),
    path("healthz", healthz),
    path("admin/", admin.site.urls),
    path("api/", include("billing.api.urls")),
    path("api/v1/", include("metering.api.urls")),
]
