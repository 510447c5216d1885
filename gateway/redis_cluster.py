"""A Redis Cluster, used like one connection: each command goes to the master of its key's slot.

Replies come in the order of the commands, whichever masters they come from, and when one master is lost the
whole is down: everything unanswered fails, the slots are read anew, and it is up again once every slot has a
master that answers. So the event log needs to know nothing of it: what was not acknowledged is sent again by its
number, and what takes long goes to the spool, as with a single server. A slot that moves is such a loss too.

Replication is asynchronous: a master that dies may take acknowledged commands with it. With `replicas_min` a reply
is held until so many replicas have the command (WAIT), and a cluster that has too few of them counts as down.
"""

from __future__ import annotations

import asyncio
import binascii
import logging
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from gateway.cleanup import run_with_cleanup
from gateway.contract.redis_url import is_cluster_url, parse_cluster_url
from gateway.errors import RedisReplyError, RedisUnavailableError
from gateway.redis_connection import (
    CONNECT_TIMEOUT_S,
    RECONNECT_DELAY_MAX_S,
    RECONNECT_DELAY_MIN_S,
    Argument,
    OnReply,
    RedisConnection,
    Script,
    pack_command,
)

log = logging.getLogger("gateway.redis")

SLOT_COUNT = 16_384
# A master that does not come up in this time may have been replaced by now: the slots are read again.
MASTER_WAIT_S = 1.0
_TAGS_REMEMBERED_MAX = 10_000
# What a node says that is not (or not yet) the master of a slot, or that has lost the others.
_REDIRECTS = frozenset({"MOVED", "ASK", "TRYAGAIN", "CLUSTERDOWN", "READONLY", "MASTERDOWN", "LOADING"})


def connect_redis(
    url: str, *, timeout_s: float, scripts: tuple[Script, ...] = (), replicas_min: int = 0
) -> RedisConnection:
    """Return a connection to the server or the cluster that `url` names, not started."""
    if is_cluster_url(url):
        return ClusterConnection(url, timeout_s=timeout_s, scripts=scripts, replicas_min=replicas_min)
    return RedisConnection(url, timeout_s=timeout_s, scripts=scripts)


class _Outstanding:
    """A command without its turn: the reply is given when it is here, replicated, and all before it were given."""

    __slots__ = ("is_ready", "on_reply", "reply")

    def __init__(self, on_reply: OnReply) -> None:
        self.on_reply = on_reply
        self.reply: Any = None
        self.is_ready = False


class ClusterConnection(RedisConnection):
    """A self-healing connection to every master of a cluster. One event loop owns it."""

    def __init__(self, url: str, *, timeout_s: float, scripts: tuple[Script, ...] = (), replicas_min: int = 0) -> None:
        super().__init__(url, timeout_s=timeout_s, scripts=scripts)
        self._cluster_url = parse_cluster_url(url)
        self._replicas_min = replicas_min
        self._known_nodes = list(self._cluster_url.nodes)
        self._masters: list[RedisConnection] = []
        self._master_of_slot: list[RedisConnection] = []
        self._master_of_tag: dict[bytes, RedisConnection] = {}
        self._outstanding: deque[_Outstanding] = deque()
        self._unreplicated: dict[RedisConnection, list[_Outstanding]] = {}

    # RedisConnection

    def set_push_handler(self, on_push: Callable[[list[Any]], None]) -> None:
        """Have `on_push` called with the pushes of every master: a message is published to all of them."""
        self._on_push = on_push

    async def close(self) -> None:
        """Stop reconnecting and close."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._lose()

    def send(self, command: tuple[Argument, ...], on_reply: OnReply) -> None:
        """Send `command` to the master of its first key; `on_reply` gets the reply or an error object, in order."""
        key = command[3] if command[0] in (b"EVALSHA", b"EVAL") else command[1]
        self._send_by_key(key if isinstance(key, bytes) else str(key).encode(), pack_command(command), on_reply)

    def send_packed(self, command: bytes, on_reply: OnReply) -> None:
        """As `send`. The first braces in the bytes are those of the first key: each key of a script has its tag."""
        self._send_by_key(command, command, on_reply)

    def _send_by_key(self, key: bytes, command: bytes, on_reply: OnReply) -> None:
        if not self.is_up:
            on_reply(RedisUnavailableError("not connected to every master of the Redis Cluster"))
            return
        master = self._find_master(get_hash_tag(key))
        outstanding = _Outstanding(on_reply)
        self._outstanding.append(outstanding)
        if self._replicas_min:
            if not self._unreplicated:
                self._loop.call_soon(self._await_replicas)
            self._unreplicated.setdefault(master, []).append(outstanding)
        master.send_packed(command, partial(self._on_master_reply, outstanding))

    def break_connection(self) -> None:
        """Drop the connections, so that everything unanswered is decided anew after a reconnect."""
        self._lost.set()
        self._drop()

    # Replies

    def _on_master_reply(self, outstanding: _Outstanding, reply: Any) -> None:
        if isinstance(reply, RedisUnavailableError) or (
            isinstance(reply, RedisReplyError) and str(reply).partition(" ")[0] in _REDIRECTS
        ):
            if self.is_up:
                log.warning("a master of the Redis Cluster is gone or has changed: %s", reply)
                self.break_connection()
            return
        outstanding.reply = reply
        outstanding.is_ready = not self._replicas_min
        self._give_replies()

    def _await_replicas(self) -> None:
        """Ask each master that got commands in this tick to say when its replicas have them."""
        unreplicated, self._unreplicated = self._unreplicated, {}
        for master, commands in unreplicated.items():
            # It must answer before the connection's own patience ends.
            command = (b"WAIT", self._replicas_min, int(self._timeout_s * 500))
            master.send(command, partial(self._on_replicated, commands))

    def _on_replicated(self, commands: list[_Outstanding], reply: Any) -> None:
        if isinstance(reply, int) and reply >= self._replicas_min:
            for outstanding in commands:
                outstanding.is_ready = True
            self._give_replies()
        elif self.is_up:
            log.warning("only %s of %d replicas have what was sent", reply, self._replicas_min)
            self.break_connection()

    def _give_replies(self) -> None:
        outstanding = self._outstanding
        while outstanding and outstanding[0].is_ready:
            first = outstanding.popleft()
            first.on_reply(first.reply)

    def _drop(self) -> None:
        """Tell the owners of unanswered commands, then the listeners, once for each loss."""
        was_up, self.is_up = self.is_up, False
        outstanding, self._outstanding = self._outstanding, deque()
        self._unreplicated = {}
        for command in outstanding:
            command.on_reply(RedisUnavailableError("lost a master of the Redis Cluster"))
        if was_up:
            for listener in self._listeners:
                listener.on_redis_down()

    # Masters

    def _find_master(self, tag: bytes) -> RedisConnection:
        master = self._master_of_tag.get(tag)
        if master is None:
            if len(self._master_of_tag) >= _TAGS_REMEMBERED_MAX:
                self._master_of_tag.clear()
            master = self._master_of_tag[tag] = self._master_of_slot[compute_slot(tag)]
        return master

    async def _keep_connected(self) -> None:
        delay_s = RECONNECT_DELAY_MIN_S
        while True:
            self._lost = asyncio.Event()
            if await run_with_cleanup(self._stay_connected(), self._lose):
                delay_s = RECONNECT_DELAY_MIN_S
            await asyncio.sleep(delay_s)
            delay_s = min(delay_s * 2, RECONNECT_DELAY_MAX_S)

    async def _stay_connected(self) -> bool:
        """Connect, and return when a master is lost; False where not all could be reached."""
        try:
            await asyncio.wait_for(self._connect(), 2 * CONNECT_TIMEOUT_S)
        except (TimeoutError, RedisReplyError, RedisUnavailableError) as error:
            log.debug("cannot reach every master of the Redis Cluster: %s", error)
            return False
        await self._lost.wait()
        log.warning("lost a master of the Redis Cluster")
        return True

    async def _lose(self) -> None:
        self._drop()
        masters, self._masters, self._master_of_slot, self._master_of_tag = self._masters, [], [], {}
        await asyncio.gather(*(master.close() for master in masters))

    async def _connect(self) -> None:
        owners = await self._read_slots()
        masters = {}
        for address in sorted(set(owners)):
            masters[address] = self._build_connection(address, self._scripts)
            self._masters.append(masters[address])
        for master in self._masters:
            master.add_listener(_MasterListener(self))
            if self._on_push is not None:
                master.set_push_handler(self._on_push)
            master.start()
        for is_up in await asyncio.gather(*(master.wait_up(MASTER_WAIT_S) for master in self._masters)):
            if not is_up:
                raise RedisUnavailableError("a master cannot be reached")
        if self._replicas_min:
            timeout_ms = int(self._timeout_s * 500)
            for count in await asyncio.gather(
                *(master.call(b"WAIT", self._replicas_min, timeout_ms) for master in self._masters)
            ):
                if count < self._replicas_min:
                    raise RedisUnavailableError(f"a master has {count} replicas of {self._replicas_min}")
        if self._lost.is_set():
            raise RedisUnavailableError("a master was lost again")
        self._master_of_slot = [masters[address] for address in owners]
        self.is_up = True
        self._came_up.set()
        log.info("connected to %d masters of the Redis Cluster", len(self._masters))
        for listener in self._listeners:
            listener.on_redis_up()

    def _build_connection(self, address: tuple[str, int], scripts: tuple[Script, ...] = ()) -> RedisConnection:
        url = self._cluster_url.build_node_url(*address)
        return RedisConnection(url, timeout_s=self._timeout_s, scripts=scripts)

    async def _read_slots(self) -> list[tuple[str, int]]:
        """Return the master's address of each slot, as the first node says that answers; raises as `call` does."""
        nodes = list(dict.fromkeys((*self._known_nodes, *self._cluster_url.nodes)))
        asked = [asyncio.create_task(self._ask_for_slots(node)) for node in nodes]

        async def stop_asking() -> None:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)

        return await run_with_cleanup(self._choose_answer(asked), stop_asking)

    async def _choose_answer(self, asked: list[asyncio.Task[list[Any]]]) -> list[tuple[str, int]]:
        for answer in asyncio.as_completed(asked):
            try:
                ranges = await answer
            except (RedisUnavailableError, RedisReplyError):
                continue
            owners, known = read_slot_ranges(ranges)
            if len(owners) == SLOT_COUNT:
                self._known_nodes = known
                return owners
        raise RedisUnavailableError("no node of the cluster knows a master for every slot")

    async def _ask_for_slots(self, address: tuple[str, int]) -> list[Any]:
        connection = self._build_connection(address)

        async def ask() -> Any:
            connection.start()
            if not await connection.wait_up(CONNECT_TIMEOUT_S):
                raise RedisUnavailableError(f"{address} does not answer")
            return await connection.call(b"CLUSTER", b"SLOTS")

        ranges = await run_with_cleanup(ask(), connection.close)
        # A node that does not know its own name says that the host is the one we asked.
        for _first, _last, *nodes in ranges:
            for node in nodes:
                node[0] = node[0] or address[0].encode()
        return ranges  # type: ignore[no-any-return]


class _MasterListener:
    """Tells the cluster's connection that a master was lost."""

    def __init__(self, cluster: ClusterConnection) -> None:
        self._cluster = cluster

    def on_redis_up(self) -> None:
        """The cluster's connection waits for all masters by itself."""

    def on_redis_down(self) -> None:
        self._cluster.break_connection()


def get_hash_tag(key: bytes) -> bytes:
    """Return what of a key decides its slot: what is in its first braces, or all of it.

    >>> get_hash_tag(b"usage:{p07}"), get_hash_tag(b"a{}b")
    (b'p07', b'a{}b')
    """
    start = key.find(b"{")
    end = key.find(b"}", start + 1)
    return key[start + 1 : end] if start >= 0 and end > start + 1 else key


def compute_slot(tag: bytes) -> int:
    """Return the slot of a hash tag.

    >>> compute_slot(b"123456789")
    12739
    """
    return binascii.crc_hqx(tag, 0) % SLOT_COUNT


def read_slot_ranges(ranges: list[Any]) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Return the master's address of each slot in order, and all nodes, of the reply to CLUSTER SLOTS.

    The first list is shorter than SLOT_COUNT where slots have no master.
    """
    owners: dict[int, tuple[str, int]] = {}
    known: dict[tuple[str, int], None] = {}
    for first, last, *nodes in ranges:
        addresses = [(node[0].decode(), int(node[1])) for node in nodes]
        known.update(dict.fromkeys(addresses))
        owners.update(dict.fromkeys(range(first, last + 1), addresses[0]))
    return [owners[slot] for slot in sorted(owners)], list(known)
