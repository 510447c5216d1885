"""Pages that ask before they act: GET explains, POST calls one service. No state changes by following a link."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from django import forms
from django.contrib import messages
from django.core.exceptions import PermissionDenied, ValidationError
from django.db.models import Model
from django.http import HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect
from django.template.response import TemplateResponse
from django.urls import reverse
from unfold.admin import ModelAdmin

from billing.core.errors import BillingError


@dataclass(frozen=True, slots=True)
class Operation:
    """What a page says and does. `perform` gets the cleaned form and returns the message of success, or a
    response of its own (a key that is shown once). It may raise BillingError: its text is shown."""

    title: str
    explanation: str
    button: str
    perform: Callable[[dict[str, Any]], str | HttpResponse]
    form_class: type[forms.Form] = forms.Form
    initial: dict[str, Any] = field(default_factory=dict)
    facts: Sequence[tuple[str, str]] = ()
    is_dangerous: bool = False


def require_permission(request: HttpRequest, permission: str) -> None:
    """Raise PermissionDenied unless the user has `app.codename`."""
    if not request.user.has_perm(permission):
        raise PermissionDenied


def run_operation(
    model_admin: ModelAdmin, request: HttpRequest, target: Model | None, operation: Operation
) -> HttpResponse:
    """Show the page of an operation, or perform it and go back to the object (or to the list without one)."""
    back = _get_back_url(model_admin, target)
    form = operation.form_class(request.POST if request.method == "POST" else None, initial=operation.initial)
    if request.method == "POST" and form.is_valid():
        try:
            done = operation.perform(form.cleaned_data)
        except BillingError as error:
            messages.error(request, str(error))
        except ValidationError as error:
            messages.error(request, " ".join(error.messages))
        else:
            if isinstance(done, HttpResponse):
                return done
            messages.success(request, done)
            return redirect(back)
    context = {
        **model_admin.admin_site.each_context(request),
        "title": operation.title,
        "operation": operation,
        "form": form,
        "back": back,
    }
    request.current_app = model_admin.admin_site.name
    status = 200 if request.method != "POST" else 400
    return TemplateResponse(request, "billing/operation.html", context, status=status)


def get_target(model_admin: ModelAdmin, request: HttpRequest, object_id: str) -> Any:
    """Return the object that a page is about; 404 where there is none that the user may see."""
    if not model_admin.has_view_permission(request):
        raise PermissionDenied
    return get_object_or_404(model_admin.get_queryset(request), pk=object_id)


def _get_back_url(model_admin: ModelAdmin, target: Model | None) -> str:
    options = model_admin.model._meta
    prefix = f"admin:{options.app_label}_{options.model_name}"
    if target is None:
        return reverse(f"{prefix}_changelist")
    return reverse(f"{prefix}_change", args=[target.pk])
