"""Staff login with bounded guessing: after too many failures one must wait."""

from __future__ import annotations

import hashlib
from typing import Any

from django.core.cache import cache
from django.core.exceptions import ValidationError
from unfold.forms import AuthenticationForm

WINDOW_S = 15 * 60
# A pair of name and address is stopped first, so that a stranger does not lock a name out for its owner.
PAIR_FAILURES_MAX = 10
NAME_FAILURES_MAX = 100
ADDRESS_FAILURES_MAX = 100


class RateLimitedLoginForm(AuthenticationForm):
    """Counts the failures of WINDOW_S by user name, by client address and by the two together.

    They are counted in Django's cache: with the default one each web worker has its own counts.
    """

    def clean(self) -> dict[str, Any]:
        limits = self._build_limits()
        if any(int(cache.get(key, 0)) >= failures_max for key, failures_max in limits.items()):
            raise ValidationError(
                "Too many failed attempts. Wait 15 minutes, or ask another administrator.",
                code="too_many_attempts",
            )
        try:
            return super().clean()
        except ValidationError:
            for key in limits:
                cache.add(key, 0, timeout=WINDOW_S)
                cache.incr(key)
            raise

    def _build_limits(self) -> dict[str, int]:
        name = self.cleaned_data.get("username", "").strip().lower()
        name = hashlib.sha256(name.encode()).hexdigest()  # a cache key takes no spaces and 250 bytes
        address = self.request.META.get("REMOTE_ADDR", "")
        return {
            f"login-failures-pair-{name}-{address}": PAIR_FAILURES_MAX,
            f"login-failures-name-{name}": NAME_FAILURES_MAX,
            f"login-failures-address-{address}": ADDRESS_FAILURES_MAX,
        }
