"""The supervisor, with stand-ins for Tollbook's own services and real embedded servers."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.embedded import AlreadyRunningError, ServerStartError
from deploy.embedded.processes import ProcessIdentity, wait_until
from deploy.embedded.runtime import apply_environment, read_last_runtime, read_runtime
from deploy.embedded.services import Service
from deploy.embedded.supervisor import Backoff, Supervisor

REPOSITORY = Path(__file__).parents[2]
HTTP_SERVICE = """
import http.server, os, sys, subprocess
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])  # a worker of its own
http.server.HTTPServer(("127.0.0.1", int(os.environ[sys.argv[1]])), Handler).serve_forever()
"""
SLEEPER = """
import signal, time
signal.signal(signal.SIGTERM, lambda *_: exit(0))
print("ready", flush=True)
time.sleep(1000)
"""


def list_stand_ins(*, gateway_url: str, **_: object) -> list[Service]:
    return [
        Service(
            name="gateway",
            argv=(sys.executable, "-c", HTTP_SERVICE, "TOLLBOOK_GATEWAY_PORT"),
            health_url=f"{gateway_url}/healthz",
        ),
        Service(name="worker", argv=(sys.executable, "-c", SLEEPER), ready_mark="ready"),
    ]


@pytest.fixture
def data_dir(server_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder for an instance that knows nothing of the servers of the tests."""
    for name in [name for name in os.environ if name.startswith("TOLLBOOK_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("deploy.embedded.supervisor.list_services", list_stand_ins)
    monkeypatch.setattr(Supervisor, "run_manage", lambda *_, **__: "")  # no migrations
    return server_folder


@pytest.fixture
def supervisor(data_dir: Path) -> Iterator[Supervisor]:
    with Supervisor(data_dir) as running:
        yield running


def test_everything_runs_and_is_written_down_without_secrets(supervisor: Supervisor, data_dir: Path) -> None:
    runtime = read_runtime(data_dir)

    assert runtime == supervisor.runtime
    assert list(runtime.processes) == ["postgres", "redis", "gateway", "worker"]
    assert all(identity.is_alive() for identity in runtime.processes.values())
    written = (data_dir / "runtime.json").read_text()
    for secret in json.loads((data_dir / "secrets.json").read_text()).values():
        assert secret not in written


def test_commands_find_the_running_instance(supervisor: Supervisor, data_dir: Path) -> None:
    environ: dict[str, str] = {"TOLLBOOK_GATEWAY_WORKERS": "7"}

    apply_environment(data_dir, environ)

    assert environ.pop("TOLLBOOK_GATEWAY_WORKERS") == "7"  # what the environment says wins
    for name, value in environ.items():
        assert supervisor.environment[name] == value
    assert {"TOLLBOOK_DATABASE_URL", "TOLLBOOK_REDIS_URL", "TOLLBOOK_SECRET_KEY"} <= set(environ)
    assert "tollbook_app:" in environ["TOLLBOOK_DATABASE_URL"]
    assert "tollbook_owner:" in environ["TOLLBOOK_OWNER_DATABASE_URL"]


def test_database_of_the_environment_is_not_mixed_with_the_embedded_owner(
    supervisor: Supervisor, data_dir: Path
) -> None:
    environ = {"TOLLBOOK_DATABASE_URL": "postgresql://elsewhere/db"}

    apply_environment(data_dir, environ)

    assert environ["TOLLBOOK_DATABASE_URL"] == "postgresql://elsewhere/db"
    assert "TOLLBOOK_OWNER_DATABASE_URL" not in environ


def test_nothing_is_applied_where_nothing_runs(data_dir: Path) -> None:
    with Supervisor(data_dir):
        pass
    environ: dict[str, str] = {}

    assert read_last_runtime(data_dir) is not None
    assert apply_environment(data_dir, environ) is None
    assert environ == {}


def test_second_instance_on_the_same_folder_is_refused(supervisor: Supervisor, data_dir: Path) -> None:
    with pytest.raises(AlreadyRunningError, match="already running"):
        Supervisor(data_dir).start()

    assert all(identity.is_alive() for identity in supervisor.runtime.processes.values())


@pytest.mark.parametrize("name", ["gateway", "worker", "postgres", "redis"])
def test_killed_process_is_started_again_on_its_port(supervisor: Supervisor, data_dir: Path, name: str) -> None:
    killed = supervisor.runtime.processes[name]
    addresses = supervisor.runtime.addresses

    os.kill(killed.pid, signal.SIGKILL)

    def is_replaced() -> bool:
        runtime = read_runtime(data_dir)
        return runtime is not None and name in runtime.processes and runtime.processes[name] != killed

    assert wait_until(is_replaced, timeout_s=30)
    runtime = read_runtime(data_dir)
    assert runtime.processes[name].is_alive()
    assert runtime.restarts == {name: 1}
    assert runtime.addresses == addresses


def test_workers_of_a_killed_service_are_ended_with_it(supervisor: Supervisor, data_dir: Path) -> None:
    killed = supervisor.runtime.processes["gateway"]
    group = killed.pid

    os.kill(killed.pid, signal.SIGKILL)

    assert wait_until(lambda: _is_group_empty(group), timeout_s=10)


def test_stop_ends_every_process(data_dir: Path) -> None:
    with Supervisor(data_dir) as supervisor:
        processes = supervisor.runtime.processes
        group = processes["gateway"].pid

    assert not any(identity.is_alive() for identity in processes.values())
    assert _is_group_empty(group)
    assert read_runtime(data_dir) is None


def test_ports_of_the_last_run_are_used_again(data_dir: Path) -> None:
    with Supervisor(data_dir) as first:
        pass
    with Supervisor(data_dir) as second:
        assert second.runtime.addresses == first.runtime.addresses
    with Supervisor(data_dir, gateway_port=_other_port(first)) as third:
        assert third.runtime.port_of("gateway") != first.runtime.port_of("gateway")


def test_service_that_ends_at_its_start_is_reported_with_its_log(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Service(name="beat", argv=(sys.executable, "-c", "exit('no schedule')"), ready_mark="ready")
    started = Supervisor(data_dir)
    monkeypatch.setattr("deploy.embedded.supervisor.list_services", lambda **_: [*list_stand_ins(**_), broken])

    with pytest.raises(ServerStartError, match="no schedule"):
        started.start()

    assert not any(process.is_running() for process in started._processes().values())


def test_servers_of_the_environment_are_used_in_place_of_embedded_ones(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOLLBOOK_DATABASE_URL", "postgresql://elsewhere/db")
    monkeypatch.setenv("TOLLBOOK_REDIS_URL", "redis://elsewhere:1/0")

    with Supervisor(data_dir) as supervisor:
        assert list(supervisor.runtime.processes) == ["gateway", "worker"]
        assert supervisor.environment["TOLLBOOK_DATABASE_URL"] == "postgresql://elsewhere/db"
        assert supervisor.environment["TOLLBOOK_REDIS_URL"] == "redis://elsewhere:1/0"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_stops_everything_and_ends_well(data_dir: Path, number: signal.Signals) -> None:
    process = _run_in_process_of_its_own(data_dir)
    processes = read_runtime(data_dir).processes

    process.send_signal(number)

    assert process.wait(30) == 0
    assert not any(identity.is_alive() for identity in processes.values())


def test_children_end_with_a_supervisor_that_was_killed_and_the_folder_can_be_used(data_dir: Path) -> None:
    process = _run_in_process_of_its_own(data_dir)
    processes = read_runtime(data_dir).processes

    process.kill()
    process.wait()

    assert read_runtime(data_dir) is None
    with Supervisor(data_dir) as successor:
        assert not any(identity.is_alive() for identity in processes.values())
        assert all(identity.is_alive() for identity in successor.runtime.processes.values())


def test_stale_service_without_a_death_signal_is_stopped_by_the_next_start(data_dir: Path) -> None:
    with Supervisor(data_dir):
        pass
    stale = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], process_group=0)
    content = json.loads((data_dir / "runtime.json").read_text())
    identity = ProcessIdentity.of(stale.pid)
    content["processes"]["worker"] = {"pid": identity.pid, "started": identity.started}
    stranger = ProcessIdentity.of(os.getpid())
    content["processes"]["beat"] = {"pid": stranger.pid, "started": "another time"}  # an id used again
    (data_dir / "runtime.json").write_text(json.dumps(content))

    with Supervisor(data_dir):
        assert stale.wait(0) == -signal.SIGTERM


def test_backoff_doubles_to_its_bound_and_forgets_after_a_calm_minute() -> None:
    backoff = Backoff()
    delays = []
    now = 0.0
    for _ in range(7):
        backoff.note_start(now)
        now = backoff.note_crash(now + 1)
        delays.append(backoff.delay_s)
    assert delays == [0.5, 1, 2, 4, 8, 15, 15]

    backoff.note_start(now)
    assert backoff.note_crash(now + 61) == now + 61.5


def _run_in_process_of_its_own(data_dir: Path) -> subprocess.Popen[str]:
    program = textwrap.dedent(
        f"""
        from pathlib import Path
        from tests.deploy.test_supervisor import list_stand_ins
        from deploy.embedded import supervisor
        supervisor.list_services = list_stand_ins
        supervisor.Supervisor.run_manage = lambda *_, **__: ""
        with supervisor.stop_on_signals(), supervisor.Supervisor(Path({str(data_dir)!r})) as running:
            print("ready", flush=True)
            running.wait()
        """
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def _is_group_empty(group: int) -> bool:
    """Whether no living process is in the group; it may hold zombies that wait for their parent."""
    time.sleep(0.05)
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    listing = subprocess.run(["ps", "-A", "-o", "pgid=,stat="], capture_output=True, text=True, check=True)
    rows = [line.split() for line in listing.stdout.splitlines()]
    return not any(int(pgid) == group and not state.startswith("Z") for pgid, state in rows)


def _other_port(supervisor: Supervisor) -> int:
    from deploy.embedded.server import choose_free_port

    return choose_free_port(taken=[supervisor.runtime.port_of("gateway")])
