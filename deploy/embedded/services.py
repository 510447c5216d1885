"""The processes of Tollbook itself, as the supervisor starts them, and how each says that it is well."""

import http.client
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit


@dataclass(frozen=True, kw_only=True)
class Service:
    """A process to run.

    It is ready once `health_url` answers, or once it has written `ready_mark` to its log.
    """

    name: str
    argv: tuple[str, ...]
    health_url: str | None = None
    ready_mark: str = ""
    stop_timeout_s: float = 15.0


def list_services(
    *, sandbox_url: str, gateway_url: str, web_url: str, data_dir: Path, drain_s: int = 0
) -> list[Service]:
    """The services in the order of their start; they stop in the reverse order."""
    celery = (sys.executable, "-m", "celery", "--app", "billing.config.celery")
    return [
        Service(name="sandbox", argv=(sys.executable, "-m", "gateway.sandbox"), health_url=f"{sandbox_url}/healthz"),
        Service(
            name="gateway",
            argv=(sys.executable, "-m", "gateway"),
            health_url=f"{gateway_url}/healthz",
            stop_timeout_s=drain_s + 20.0,  # streams in flight may end first
        ),
        Service(name="web", argv=_web_argv(web_url), health_url=f"{web_url}/healthz"),
        Service(
            name="worker",
            # A single node has nobody to gossip with. Two processes: the machine has two cores.
            argv=(
                *celery,
                "worker",
                "--concurrency",
                "2",
                "--without-gossip",
                "--without-mingle",
                "--loglevel",
                "INFO",
            ),
            ready_mark=" ready.",
            stop_timeout_s=30.0,  # running tasks end first
        ),
        Service(
            name="beat",
            argv=(
                *celery,
                "beat",
                "--schedule",
                str(data_dir / "beat-schedule"),
                "--pidfile",
                "",
                "--loglevel",
                "INFO",
            ),
        ),
    ]


def _web_argv(web_url: str) -> tuple[str, ...]:
    return (
        *(sys.executable, "-m", "gunicorn", "billing.config.wsgi:application"),
        *("--bind", urlsplit(web_url).netloc, "--worker-class", "gthread", "--workers", "1", "--threads", "4"),
        *("--graceful-timeout", "10", "--no-control-socket"),
    )


def answers_well(url: str, *, timeout_s: float = 2.0) -> bool:
    """Whether a GET of the URL is answered with a status below 500.

    A service that has no such path (404) still shows that it is up; one that says 503 is not well.
    """
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout_s)
    try:
        connection.request("GET", parts.path or "/")
        return connection.getresponse().status < 500
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
