"""A Redis Cluster, used like one connection: each command goes to the master of its key's slot.

A master that is lost takes nothing with it but its own slots: what it has not answered fails, commands for its slots
fail at once, and those of the other masters go on. The slots are read anew until every one has a master that answers.
The keys of a partition lie in one slot, and replies of one master come in the order of its commands, so to the event
log each partition has a single server: what was not acknowledged is sent again by its number, and what takes long
goes to the spool. A slot that moves is a loss of the master that had it.

Replication is asynchronous: a master that dies may take acknowledged commands with it. With `replicas_min` a reply
is held until so many replicas have the command (WAIT), and a master that has too few of them counts as lost.
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
Address = tuple[str, int]
# A master that does not come up in this time may have been replaced by now: the slots are read again.
MASTER_WAIT_S = 1.0
# Reading the slots, and connecting to the masters.
TURN_S_MAX = 2 * CONNECT_TIMEOUT_S
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


class _Master:
    """One master, until it is lost: then it is closed, and connected anew as another one."""

    def __init__(
        self, connection: RedisConnection, *, timeout_s: float, replicas_min: int, on_lost: Callable[[_Master], None]
    ) -> None:
        self.connection = connection
        self.is_lost = False
        self._on_lost = on_lost
        self._replicas_min = replicas_min
        # A WAIT must be answered before the connection's own patience ends.
        self._replicas_timeout_ms = int(timeout_s * 500)
        self._loop = asyncio.get_running_loop()
        self._outstanding: deque[_Outstanding] = deque()
        self._unreplicated: list[_Outstanding] = []
        connection.add_listener(self)

    async def open(self) -> None:
        """Connect; raises RedisUnavailableError or RedisReplyError where that takes long or replicas are missing."""
        self.connection.start()
        if not await self.connection.wait_up(MASTER_WAIT_S):
            raise RedisUnavailableError("a master cannot be reached")
        if self._replicas_min:
            count = await self.connection.call(b"WAIT", self._replicas_min, self._replicas_timeout_ms)
            if count < self._replicas_min:
                raise RedisUnavailableError(f"a master has {count} replicas of {self._replicas_min}")
        if self.is_lost:
            raise RedisUnavailableError("a master was lost again")

    def send_packed(self, command: bytes, on_reply: OnReply) -> None:
        """Send `command`; `on_reply` gets the reply or an error object, in order."""
        outstanding = _Outstanding(on_reply)
        self._outstanding.append(outstanding)
        if self._replicas_min:
            if not self._unreplicated:
                self._loop.call_soon(self._await_replicas)
            self._unreplicated.append(outstanding)
        self.connection.send_packed(command, partial(self._on_reply, outstanding))

    def lose(self) -> None:
        """Tell the owners of unanswered commands, then the cluster, once."""
        if self.is_lost:
            return
        self.is_lost = True
        self.connection.break_connection()
        outstanding, self._outstanding = self._outstanding, deque()
        for command in outstanding:
            command.on_reply(RedisUnavailableError("lost a master of the Redis Cluster"))
        self._on_lost(self)

    # ConnectionListener

    def on_redis_up(self) -> None:
        """`open` waits for it."""

    def on_redis_down(self) -> None:
        """Also where nothing was unanswered."""
        self.lose()

    # Replies

    def _on_reply(self, outstanding: _Outstanding, reply: Any) -> None:
        if self.is_lost:
            return
        if isinstance(reply, RedisUnavailableError) or (
            isinstance(reply, RedisReplyError) and str(reply).partition(" ")[0] in _REDIRECTS
        ):
            log.warning("a master of the Redis Cluster is gone or has changed: %s", reply)
            self.lose()
            return
        outstanding.reply = reply
        outstanding.is_ready = not self._replicas_min
        self._give_replies()

    def _await_replicas(self) -> None:
        """Ask the master, if it got commands in this tick, to say when its replicas have them."""
        commands, self._unreplicated = self._unreplicated, []
        command = (b"WAIT", self._replicas_min, self._replicas_timeout_ms)
        self.connection.send(command, partial(self._on_replicated, commands))

    def _on_replicated(self, commands: list[_Outstanding], reply: Any) -> None:
        if isinstance(reply, int) and reply >= self._replicas_min:
            for outstanding in commands:
                outstanding.is_ready = True
            self._give_replies()
        elif not self.is_lost:
            log.warning("only %s of %d replicas have what was sent", reply, self._replicas_min)
            self.lose()

    def _give_replies(self) -> None:
        outstanding = self._outstanding
        while outstanding and outstanding[0].is_ready:
            first = outstanding.popleft()
            first.on_reply(first.reply)


class ClusterConnection(RedisConnection):
    """A self-healing connection to every master of a cluster. `is_up`: every slot has one. One event loop owns it."""

    def __init__(self, url: str, *, timeout_s: float, scripts: tuple[Script, ...] = (), replicas_min: int = 0) -> None:
        super().__init__(url, timeout_s=timeout_s, scripts=scripts)
        # Of a turn that comes too early all is spent; of the next one, at most what other nodes take that are silent.
        self.reconnect_s_max = TURN_S_MAX + RECONNECT_DELAY_MAX_S + CONNECT_TIMEOUT_S
        self._cluster_url = parse_cluster_url(url)
        self._replicas_min = replicas_min
        self._known_nodes = list(self._cluster_url.nodes)
        # By slot, as the cluster says; None where it knows no master.
        self._owners: list[Address | None] = [None] * SLOT_COUNT
        self._masters: dict[Address, _Master] = {}
        self._master_of_tag: dict[bytes, _Master] = {}
        self._to_close: list[_Master] = []
        self._changed = asyncio.Event()

    # RedisConnection

    @property
    def is_partly_up(self) -> bool:
        """Whether some masters are there, and others not."""
        return bool(self._masters) and not self.is_up

    def is_up_for(self, key: str) -> bool:
        """Return whether the slot of `key` has a master that answers."""
        return self._find_master(get_hash_tag(key.encode())) is not None

    async def close(self) -> None:
        """Stop reconnecting and close."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self.break_connection()
        await self._close_lost()

    def send(self, command: tuple[Argument, ...], on_reply: OnReply) -> None:
        """Send `command` to the master of its first key; `on_reply` gets the reply or an error object, in order."""
        key = command[3] if command[0] in (b"EVALSHA", b"EVAL") else command[1]
        self._send_by_key(key if isinstance(key, bytes) else str(key).encode(), pack_command(command), on_reply)

    def send_packed(self, command: bytes, on_reply: OnReply) -> None:
        """As `send`. The first braces in the bytes are those of the first key: each key of a script has its tag."""
        self._send_by_key(command, command, on_reply)

    def _send_by_key(self, key: bytes, command: bytes, on_reply: OnReply) -> None:
        master = self._find_master(get_hash_tag(key))
        if master is None:
            on_reply(RedisUnavailableError("not connected to the master of the key's slot"))
            return
        master.send_packed(command, on_reply)

    def break_connection(self) -> None:
        """Drop the connections, so that everything unanswered is decided anew after a reconnect."""
        for master in tuple(self._masters.values()):
            master.lose()

    # Masters

    def _find_master(self, tag: bytes) -> _Master | None:
        master = self._master_of_tag.get(tag)
        if master is None:
            address = self._owners[compute_slot(tag)]
            master = self._masters.get(address) if address is not None else None
            if master is None:
                return None
            if len(self._master_of_tag) >= _TAGS_REMEMBERED_MAX:
                self._master_of_tag.clear()
            self._master_of_tag[tag] = master
        return None if master.is_lost else master

    def _on_lost(self, master: _Master) -> None:
        address = next((address for address, known in self._masters.items() if known is master), None)
        if address is None:
            return
        log.warning("lost the master %s:%d of the Redis Cluster", *address)
        del self._masters[address]
        self._master_of_tag.clear()
        self._to_close.append(master)
        self.is_up = False
        self._changed.set()
        for listener in self._listeners:
            listener.on_redis_down()

    async def _close_lost(self) -> None:
        masters, self._to_close = self._to_close, []
        await asyncio.gather(*(master.connection.close() for master in masters))

    async def _keep_connected(self) -> None:
        delay_s = RECONNECT_DELAY_MIN_S
        while True:
            self._changed.clear()
            try:
                await asyncio.wait_for(self._connect(), TURN_S_MAX)
            except (TimeoutError, RedisReplyError, RedisUnavailableError) as error:
                log.debug("cannot reach every master of the Redis Cluster: %s", error)
            if self.is_up:
                delay_s = RECONNECT_DELAY_MIN_S
                await self._changed.wait()
            await asyncio.sleep(delay_s)
            delay_s = min(delay_s * 2, RECONNECT_DELAY_MAX_S)

    async def _connect(self) -> None:
        """Read the slots and connect to each master that is not connected; raises where one cannot be."""
        await self._close_lost()
        self._apply_owners(await self._read_slots())
        missing = sorted({owner for owner in self._owners if owner is not None} - set(self._masters))
        outcomes = await asyncio.gather(*(self._open_master(address) for address in missing), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    def _apply_owners(self, owners: list[Address | None]) -> None:
        moves = {(old, new) for old, new in zip(self._owners, owners, strict=True) if old != new}
        for old, _new in moves:
            # What it has not answered must fail before another master gets the next commands for the same keys.
            if old in self._masters:
                self._masters[old].lose()
        self._owners = owners
        self._master_of_tag.clear()
        if any(new in self._masters for _old, new in moves):
            self._note_up()

    async def _open_master(self, address: Address) -> None:
        master = _Master(
            self._build_connection(address, self._scripts),
            timeout_s=self._timeout_s,
            replicas_min=self._replicas_min,
            on_lost=self._on_lost,
        )
        if self._on_push is not None:
            # A message is published to all masters.
            master.connection.set_push_handler(self._on_push)
        # Unless it comes up.
        self._to_close.append(master)
        await master.open()
        self._to_close.remove(master)
        self._masters[address] = master
        log.info("connected to the master %s:%d of the Redis Cluster", *address)
        self._note_up()

    def _note_up(self) -> None:
        self.is_up = all(owner in self._masters for owner in set(self._owners))
        if self.is_up:
            self._came_up.set()
        for listener in self._listeners:
            listener.on_redis_up()

    def _build_connection(self, address: Address, scripts: tuple[Script, ...] = ()) -> RedisConnection:
        url = self._cluster_url.build_node_url(*address)
        return RedisConnection(url, timeout_s=self._timeout_s, scripts=scripts)

    async def _read_slots(self) -> list[Address | None]:
        """Return the master's address of each slot, as the first node says that knows one for all of them.

        Where none does, as the one says that knows most; raises RedisUnavailableError where no node answers.
        """
        nodes = list(dict.fromkeys((*self._known_nodes, *self._cluster_url.nodes)))
        asked = [asyncio.create_task(self._ask_for_slots(node)) for node in nodes]

        async def stop_asking() -> None:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)

        return await run_with_cleanup(self._choose_answer(asked), stop_asking)

    async def _choose_answer(self, asked: list[asyncio.Task[list[Any]]]) -> list[Address | None]:
        best: list[Address | None] = []
        for answer in asyncio.as_completed(asked):
            try:
                ranges = await answer
            except (RedisUnavailableError, RedisReplyError):
                continue
            owners, known = read_slot_ranges(ranges)
            if not best or owners.count(None) < best.count(None):
                best, self._known_nodes = owners, known
            if None not in best:
                break
        if not best:
            raise RedisUnavailableError("no node of the cluster answers")
        return best

    async def _ask_for_slots(self, address: Address) -> list[Any]:
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


def read_slot_ranges(ranges: list[Any]) -> tuple[list[Address | None], list[Address]]:
    """Return the master's address of each slot, None where it has none, and all nodes, of a reply to CLUSTER SLOTS."""
    owners: list[Address | None] = [None] * SLOT_COUNT
    known: dict[Address, None] = {}
    for first, last, *nodes in ranges:
        addresses = [(node[0].decode(), int(node[1])) for node in nodes]
        known.update(dict.fromkeys(addresses))
        owners[first : last + 1] = [addresses[0]] * (last + 1 - first)
    return owners, list(known)
