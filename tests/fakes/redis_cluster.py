"""A real Redis Cluster on loopback: three masters with a replica each."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import redis

from deploy.embedded import EmbeddedRedis
from deploy.embedded.secrets import load_secrets
from deploy.embedded.server import choose_free_port
from gateway.redis_cluster import SLOT_COUNT

MASTERS = 3
NODE_TIMEOUT_MS = 1_000
_TIMEOUT_S = 20.0


class LoopbackCluster:
    """Six servers: node `n` is a master to begin with and node `n + MASTERS` its replica."""

    def __init__(self, folder: Path) -> None:
        load_secrets(folder / "node-0")
        self.nodes = [self._build_node(folder, number) for number in range(2 * MASTERS)]

    def _build_node(self, folder: Path, number: int) -> EmbeddedRedis:
        node_folder = folder / f"node-{number}"
        if number:  # all nodes have the password of the first
            node_folder.mkdir()
            shutil.copy2(folder / "node-0" / "secrets.json", node_folder)
        password = load_secrets(node_folder)["redis_password"]
        lines = (
            "cluster-enabled yes",
            f"cluster-port {choose_free_port()}",
            f"cluster-node-timeout {NODE_TIMEOUT_MS}",
            f"masterauth {password}",
            # As deploy/README.md says: the others go on without a master.
            "cluster-require-full-coverage no",
            "repl-diskless-sync-delay 0",
        )
        return EmbeddedRedis(node_folder, extra=lines)

    @property
    def url(self) -> str:
        """The URL of the cluster, by the addresses of two of its nodes."""
        credentials = self.nodes[0].url().removeprefix("redis://").rpartition("@")[0]
        return f"redis+cluster://{credentials}@" + ",".join(f"127.0.0.1:{node.port}" for node in self.nodes[1:3])

    def connect_node(self, number: int) -> redis.Redis:
        """Return a client of one node."""
        return redis.Redis.from_url(self.nodes[number].url(), socket_timeout=5)

    def __enter__(self) -> LoopbackCluster:
        for node in self.nodes:
            node.start()
        clients = [self.connect_node(number) for number in range(len(self.nodes))]
        for number, client in enumerate(clients):
            client.execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)
        bus_ports = [client.config_get("cluster-port")["cluster-port"] for client in clients]
        for client in clients:
            for node, bus_port in zip(self.nodes, bus_ports, strict=True):
                client.execute_command("CLUSTER MEET", "127.0.0.1", node.port, bus_port)
        for number in range(MASTERS):
            first, end = number * SLOT_COUNT // MASTERS, (number + 1) * SLOT_COUNT // MASTERS
            clients[number].execute_command("CLUSTER ADDSLOTSRANGE", first, end - 1)
        ids = [client.execute_command("CLUSTER MYID").decode() for client in clients]
        for number in range(MASTERS, 2 * MASTERS):
            wait_until(lambda client=clients[number]: _list_known_ids(client) >= set(ids))
            clients[number].execute_command("CLUSTER REPLICATE", ids[number - MASTERS])
        for number, client in enumerate(clients):
            wait_until(lambda client=client: client.cluster("info")["cluster_state"] == "ok")
            if number < MASTERS:
                wait_until(lambda client=client: client.wait(1, 100) == 1)
            client.close()
        return self

    def __exit__(self, *_: object) -> None:
        for node in self.nodes:
            node.kill()

    def find_master(self, key: str) -> int:
        """Return the number of the node that is the master of `key`'s slot now."""
        with self._connect_any() as client:
            slot = client.execute_command("CLUSTER KEYSLOT", key)
            for first, last, master, *_replicas in client.execute_command("CLUSTER SLOTS"):
                if first <= slot <= last:
                    return [node.port for node in self.nodes].index(master[1])
        raise AssertionError(f"no master has the slot of {key}")

    def move_empty_slot(self, slot: int, number: int) -> None:
        """Give a slot that holds no key to the master `number`, as the end of a migration does."""
        with self.connect_node(number) as client:
            new_id = client.execute_command("CLUSTER MYID")
        for other in (number, *(n for n in range(len(self.nodes)) if n != number)):
            with self.connect_node(other) as client:
                if client.role()[0] == b"master":
                    client.execute_command("CLUSTER SETSLOT", slot, "NODE", new_id)

    def _connect_any(self) -> redis.Redis:
        return self.connect_node(next(number for number, node in enumerate(self.nodes) if node.is_running()))


def _list_known_ids(client: redis.Redis) -> set[str]:
    return {str(node["node_id"]) for node in client.cluster("nodes").values()}


def wait_until(is_true: Callable[[], bool]) -> None:
    """Return when `is_true` is; fails when that takes too long."""
    deadline = time.monotonic() + _TIMEOUT_S
    while time.monotonic() < deadline:
        if is_true():
            return
        time.sleep(0.02)
    raise AssertionError("the cluster did not come to be as it must")
