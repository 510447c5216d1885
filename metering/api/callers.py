"""Whose usage a caller may see.

Who calls is decided by the authentication and permission that the settings name for all of the API: a tenant by its
key, staff by the session of the admin. They are billing's, which metering does not import; what it knows of a caller
is this file.
"""

from __future__ import annotations

from rest_framework.request import Request


def get_own_tenant_id(request: Request) -> int | None:
    """Return the tenant that a caller is limited to, or None for staff, who see all."""
    caller = request.user
    return None if caller.is_staff else int(caller.tenant_id)
