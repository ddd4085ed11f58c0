"""Bytes as they pass: a relay in front of Flower's port.

Flower tells neither bytes nor which of its clients a connection belongs to. So clients come to this
relay, which hands everything on as it is, TLS included, and counts. It admits one connection at a
time and waits for Flower to register the client: that is how it knows whose connection it is.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass

from library.training.errors import UserError

logger = logging.getLogger(__name__)

CHUNK = 1 << 16  # bytes that are on their way inside the relay, for each way of a connection
LATE = 30.0  # seconds that Flower's own port may take to open
QUIET = 2.0  # seconds that a connection may send nothing: a client speaks first, and at once
SETTLE = 0.2  # seconds in which Flower may still register a client whose connection has just ended


@dataclass(frozen=True)
class Traffic:
    """Bytes of a client: `sent` to the server and `received` from it."""

    sent: int
    received: int


class _Connection:
    """A client's connection and the one made for it to the server."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client, self.server = client, server
        self.claimed = asyncio.Event()
        self._come_from = {client: 0, server: 0}

    @property
    def traffic(self) -> Traffic:
        return Traffic(self._come_from[self.client], self._come_from[self.server])

    async def hand_on(self) -> None:
        """Until both sides are through, or one has reset; then both are closed."""
        with self.client, self.server:  # closed even if what ends the ways is itself cancelled
            ways = [
                asyncio.create_task(self._hand_on(self.client, self.server)),
                asyncio.create_task(self._hand_on(self.server, self.client)),
            ]
            try:
                with suppress(OSError):  # a reset, by either side
                    await asyncio.gather(*ways)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)

    async def _hand_on(self, source: socket.socket, to: socket.socket) -> None:
        """One way. What has come is counted before it goes on: who asks for the traffic because
        something has arrived finds it counted."""
        loop = asyncio.get_running_loop()
        to.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while data := await loop.sock_recv(source, CHUNK):
            self._come_from[source] += len(data)
            await loop.sock_sendall(to, data)
            await asyncio.sleep(0)  # the others' turn: neither call waits while the sockets keep up
        to.shutdown(socket.SHUT_WR)


class Relay:
    """Listens where clients come to, and hands on to the server; a context.

    A gRPC channel is one connection, but two channels of one process to the same address share
    theirs: each Flower client needs a process of its own.

    Args:
        listen: host and port; port 0 takes a free one, host `::` all addresses of both kinds.
        server: host and port of Flower itself.
        patience: seconds that a connection which has sent something may take to be claimed; then
            it is closed, and the next is admitted.

    Raises:
        UserError: the address cannot be listened on.
    """

    def __init__(
        self, listen: tuple[str, int], server: tuple[str, int], patience: float = 20.0
    ) -> None:
        self.server, self.patience = server, patience
        try:
            self._listener = socket.create_server(
                listen,
                family=_family(listen[0]),
                dualstack_ipv6=listen[0] == "::" and socket.has_dualstack_ipv6(),
            )
        except OSError as error:
            raise UserError(
                f"{listen[0]}:{listen[1]} cannot be listened on ({error.strerror or error}): "
                "another program may have it. Give another --address, or end that program."
            ) from error
        self._listener.setblocking(False)
        host, port = self._listener.getsockname()[:2]
        self.address: tuple[str, int] = (host, port)
        self._lock = threading.Lock()
        self._admitting: _Connection | None = None
        self._all: list[_Connection] = []
        self._claimed: dict[str, _Connection] = {}
        self._passing: set[asyncio.Task[None]] = set()  # the loop itself keeps no tasks alive
        self._thread: threading.Thread | None = None
        self._started = threading.Event()

    def start(self) -> None:
        """Admit clients from now on."""
        self._thread = threading.Thread(target=self._work, name="relay", daemon=True)
        self._thread.start()
        self._started.wait()

    def close(self) -> None:
        """Close all connections and the address; what was counted can still be asked for."""
        if self._thread is not None and self._thread.is_alive():
            with suppress(RuntimeError):  # it has ended by itself meanwhile
                self._loop.call_soon_threadsafe(self._main.cancel)
            self._thread.join()
        self._listener.close()

    def __enter__(self) -> Relay:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def claim(self, cid: str) -> None:
        """The connection that is being admitted belongs to this client of Flower's.

        Raises:
            RuntimeError: none is.
        """
        with self._lock:
            connection, self._admitting = self._admitting, None
            if connection is None:
                raise RuntimeError(f"Flower's client {cid} has not come through the relay.")
            self._claimed[cid] = connection
            self._loop.call_soon_threadsafe(connection.claimed.set)

    def traffic(self, cid: str) -> Traffic:
        """What a client has sent and received since it came, also when it has gone.

        Raises:
            KeyError: no such client has come.
        """
        with self._lock:
            if cid not in self._claimed:
                raise KeyError(f"no client {cid} has come through the relay")
            connection = self._claimed[cid]
        return connection.traffic

    def total(self) -> Traffic:
        """All connections together, also those that nobody has claimed."""
        with self._lock:
            connections = list(self._all)
        counts = [one.traffic for one in connections]
        return Traffic(sum(one.sent for one in counts), sum(one.received for one in counts))

    def _work(self) -> None:
        with suppress(asyncio.CancelledError):  # close()
            asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._main = asyncio.create_task(self._admit_all())
        self._started.set()
        await self._main

    async def _admit_all(self) -> None:
        """Those who wait for admission wait in the listener's queue."""
        while True:
            try:
                client, _ = await self._loop.sock_accept(self._listener)
            except OSError as error:  # no file descriptor left, or the client has gone already
                logger.warning("a client could not be let in: %s", error)
                await asyncio.sleep(0.1)
                continue
            try:
                server = await self._reach_server()
            except BaseException as error:
                client.close()
                if not isinstance(error, OSError):
                    raise
                logger.warning("no server at %s:%d: %s", *self.server, error)
            else:
                client.setblocking(False)
                await self._admit(_Connection(client, server))

    async def _admit(self, connection: _Connection) -> None:
        """Return when it is known whose connection it is, or that it will be nobody's."""
        with self._lock:
            self._admitting = connection
            self._all.append(connection)
        passing = asyncio.create_task(connection.hand_on())
        claimed = asyncio.create_task(connection.claimed.wait())
        self._passing.add(passing)
        passing.add_done_callback(self._passing.discard)
        either = {"return_when": asyncio.FIRST_COMPLETED}
        try:
            done, _ = await asyncio.wait({passing, claimed}, timeout=QUIET, **either)
            if not done and connection.traffic.sent:
                await asyncio.wait({passing, claimed}, timeout=self.patience, **either)
            if passing.done():
                await asyncio.wait({claimed}, timeout=SETTLE)
        finally:
            claimed.cancel()
            with self._lock:
                nobodys, self._admitting = self._admitting is connection, None
            sent = connection.traffic.sent
        if nobodys and not passing.done():
            logger.warning("a connection is closed: no client, after %d bytes of it", sent)
            passing.cancel()

    async def _reach_server(self) -> socket.socket:
        """A connection to Flower's port, which opens a moment after the relay's."""
        deadline = time.monotonic() + LATE
        while True:
            server = socket.socket(_family(self.server[0]))
            server.setblocking(False)
            try:
                await self._loop.sock_connect(server, self.server)
                return server
            except BaseException as error:
                server.close()
                if not isinstance(error, OSError) or time.monotonic() > deadline:
                    raise
            await asyncio.sleep(0.1)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
