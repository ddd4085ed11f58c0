"""lora/federated/wire.py: every byte counted, for the client that it belongs to, and handed on."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="federated runs need flwr")

from library.training.errors import UserError
from lora.federated import wire
from lora.federated.wire import Relay, Traffic

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 10.0  # that anything here may take before it counts as hanging


class Upstream:
    """The server behind the relay: hands out the connections that reach it."""

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        self.socket = socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET
        )
        self.socket.settimeout(SECONDS)
        self.address: tuple[str, int] = self.socket.getsockname()[:2]

    def accept(self, seconds: float = SECONDS) -> socket.socket:
        self.socket.settimeout(seconds)
        connection, _ = self.socket.accept()
        connection.settimeout(SECONDS)
        return connection


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    server = Upstream()
    yield server
    server.socket.close()


@contextlib.contextmanager
def relay_to(upstream: Upstream, patience: float = 20.0) -> Iterator[Relay]:
    with Relay(("127.0.0.1", 0), upstream.address, patience) as relay:
        yield relay


def connect(relay: Relay) -> socket.socket:
    return socket.create_connection(relay.address, timeout=SECONDS)


def read(connection: socket.socket, number: int) -> bytes:
    data = bytearray()
    while len(data) < number and (more := connection.recv(number - len(data))):
        data += more
    return bytes(data)


def claim(relay: Relay, cid: str) -> None:
    """As Flower does, whom the first bytes must have reached; the tests may be faster than that."""
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            return relay.claim(cid)
        except RuntimeError:
            assert time.monotonic() < deadline, "no connection to claim"
            time.sleep(0.005)


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def is_over(connection: socket.socket) -> bool:
    """Closed or reset by the other side; waits for it."""
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True


def test_counts_are_exact_in_both_directions_and_stay_after_the_end(upstream: Upstream) -> None:
    up, down = random.randbytes(123_457), random.randbytes(7_001)
    with relay_to(upstream) as relay, connect(relay) as client, upstream.accept() as server:
        claim(relay, "one")
        client.sendall(up)
        assert read(server, len(up)) == up
        assert relay.traffic("one") == Traffic(len(up), 0)  # at once, not a moment later
        server.sendall(down)
        assert read(client, len(down)) == down
        assert relay.traffic("one") == Traffic(len(up), len(down))
    assert relay.traffic("one") == relay.total() == Traffic(len(up), len(down))


def test_a_slow_reader_holds_the_sender_back(upstream: Upstream) -> None:
    size, payload = 20_000_000, random.randbytes(1_000_000) * 20
    with relay_to(upstream) as relay, connect(relay) as client, upstream.accept() as server:
        claim(relay, "one")
        sending = [
            threading.Thread(target=one.sendall, args=(payload,), daemon=True)
            for one in (client, server)
        ]
        for thread in sending:
            thread.start()
        time.sleep(0.5)  # nobody reads: all that is under way is in buffers of the system
        stuck = relay.traffic("one")
        assert 0 < stuck.sent < size
        assert 0 < stuck.received < size
        time.sleep(0.2)
        assert relay.traffic("one") == stuck
        assert read(server, size) == payload
        assert read(client, size) == payload
        for thread in sending:
            thread.join(SECONDS)
        assert relay.traffic("one") == Traffic(size, size)


def test_two_at_once_are_admitted_in_turn_and_told_apart(upstream: Upstream) -> None:
    with relay_to(upstream) as relay, connect(relay) as first, connect(relay) as second:
        first.sendall(b"1" * 10)
        second.sendall(b"2" * 200)
        with upstream.accept() as one:
            assert read(one, 10) == b"1" * 10
            with pytest.raises(TimeoutError):
                upstream.accept(0.3)  # the second waits for the first to be claimed
            claim(relay, "first")
            with upstream.accept() as two:
                assert read(two, 200) == b"2" * 200
                claim(relay, "second")
                one.sendall(b"x" * 3)
                two.sendall(b"y" * 4)
                assert read(first, 3) == b"xxx"
                assert read(second, 4) == b"yyyy"
        assert relay.traffic("first") == Traffic(10, 3)
        assert relay.traffic("second") == Traffic(200, 4)
        assert relay.total() == Traffic(210, 7)


def test_one_that_is_never_claimed_is_closed_and_the_next_admitted(
    upstream: Upstream, caplog: pytest.LogCaptureFixture
) -> None:
    with relay_to(upstream, patience=0.3) as relay:
        with connect(relay) as nobody, upstream.accept(), connect(relay) as client:
            nobody.sendall(b"GET /")
            assert is_over(nobody)  # so that it cannot be claimed late, as if it were the next
            with upstream.accept() as server:
                claim(relay, "one")
                client.sendall(b"abc")
                assert read(server, 3) == b"abc"
                time.sleep(0.5)  # longer than the patience, but claimed
                client.sendall(b"d")
                assert read(server, 1) == b"d"
        assert relay.traffic("one") == Traffic(4, 0)
        assert relay.total() == Traffic(9, 0)
    assert "no client, after 5 bytes" in caplog.text


def test_idle_connections_hold_nobody_up_for_long(
    upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "QUIET", 0.3)
    with relay_to(upstream) as relay, connect(relay) as idle, connect(relay) as client:
        client.sendall(b"abc")
        with upstream.accept(), upstream.accept(2.0) as server:
            assert is_over(idle)
            assert read(server, 3) == b"abc"
            time.sleep(0.5)  # longer than may be kept quiet, but it has spoken
            claim(relay, "one")
        assert relay.traffic("one") == Traffic(3, 0)


def test_one_that_closes_unclaimed_makes_room_at_once(upstream: Upstream) -> None:
    with relay_to(upstream) as relay, connect(relay) as gone, upstream.accept() as server:
        gone.close()
        assert is_over(server)
        server.close()
        with connect(relay), upstream.accept(2.0):
            claim(relay, "one")
        assert relay.traffic("one") == Traffic(0, 0)


def test_a_claim_that_comes_just_behind_the_end_is_not_taken_for_the_next(
    upstream: Upstream,
) -> None:
    with relay_to(upstream) as relay, connect(relay) as gone, connect(relay) as client:
        gone.sendall(b"12345")
        with upstream.accept() as server:
            assert read(server, 5) == b"12345"
            reset(gone)
            assert is_over(server)
        relay.claim("gone")
        with upstream.accept() as server:
            claim(relay, "one")
            client.sendall(b"1")
            assert read(server, 1) == b"1"
        assert relay.traffic("gone").sent == 5
        assert relay.traffic("one").sent == 1


def test_a_claim_without_a_connection_and_an_unknown_client_are_errors(upstream: Upstream) -> None:
    with relay_to(upstream) as relay:
        with pytest.raises(RuntimeError, match="client one has not come through the relay"):
            relay.claim("one")
        with connect(relay), upstream.accept():
            claim(relay, "one")
            with pytest.raises(RuntimeError, match="client two"):
                relay.claim("two")  # the only connection has its owner
        with pytest.raises(KeyError, match="no client two has come"):
            relay.traffic("two")


def test_a_half_closed_connection_goes_on_the_other_way(upstream: Upstream) -> None:
    with relay_to(upstream) as relay, connect(relay) as client, upstream.accept() as server:
        claim(relay, "one")
        client.sendall(b"question")
        client.shutdown(socket.SHUT_WR)
        assert read(server, 99) == b"question"  # up to the end
        server.sendall(b"answer")
        server.close()
        assert read(client, 99) == b"answer"
        assert relay.traffic("one") == Traffic(8, 6)


@pytest.mark.parametrize("who", ["client", "server"])
def test_a_reset_reaches_the_other_side_at_once(upstream: Upstream, who: str) -> None:
    with relay_to(upstream) as relay, connect(relay) as client, upstream.accept() as server:
        claim(relay, "one")
        dead, left = (client, server) if who == "client" else (server, client)
        started = time.monotonic()
        reset(dead)
        assert is_over(left)
        assert time.monotonic() - started < 1.0


def test_a_server_that_comes_late_is_waited_for(upstream: Upstream) -> None:
    address = upstream.address
    upstream.socket.close()
    with Relay(("127.0.0.1", 0), address) as relay, connect(relay) as client:
        client.sendall(b"early")
        time.sleep(0.5)
        late = Upstream(*address)
        with late.accept() as server:
            assert read(server, 5) == b"early"
        late.socket.close()


def test_without_a_server_the_client_is_sent_away(
    upstream: Upstream, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(wire, "LATE", 0.3)
    upstream.socket.close()
    with relay_to(upstream) as relay, connect(relay) as client:
        assert is_over(client)
    assert f"no server at 127.0.0.1:{upstream.address[1]}" in caplog.text


@pytest.mark.parametrize(("listen", "come_to"), [("::1", "::1"), ("::", "127.0.0.1")])
def test_ipv6(listen: str, come_to: str) -> None:
    try:
        upstream = Upstream("::1")
    except OSError:
        pytest.skip("no IPv6 here")
    with Relay((listen, 0), upstream.address) as relay:
        client = socket.create_connection((come_to, relay.address[1]), timeout=SECONDS)
        with client, upstream.accept() as server:
            claim(relay, "one")
            client.sendall(b"six")
            assert read(server, 3) == b"six"
    upstream.socket.close()


def test_a_port_in_use_is_named(upstream: Upstream) -> None:
    port = upstream.address[1]
    with pytest.raises(UserError, match=rf"127\.0\.0\.1:{port} cannot be.*another --address"):
        Relay(upstream.address, ("127.0.0.1", 1))


def test_connections_that_end_while_the_relay_does_are_closed(upstream: Upstream) -> None:
    for _ in range(50):
        with relay_to(upstream) as relay, connect(relay), upstream.accept():
            pass
        for connection in relay._all:
            assert (connection.client.fileno(), connection.server.fileno()) == (-1, -1)


def test_close_ends_all_at_once_and_quietly(caplog: pytest.LogCaptureFixture) -> None:
    upstream = Upstream()
    relay = Relay(("127.0.0.1", 0), upstream.address)
    relay.start()
    with connect(relay) as claimed, upstream.accept() as server, connect(relay) as waiting:
        claim(relay, "one")
        with upstream.accept() as unclaimed:  # being admitted
            threading.Thread(target=send_until_closed, args=(server,), daemon=True).start()
            started = time.monotonic()
            relay.close()
            relay.close()  # once more does no harm
            assert time.monotonic() - started < 2.0
            assert is_over(waiting)
            assert is_over(unclaimed)
            assert ends(claimed)
    with pytest.raises(ConnectionError):
        connect(relay)
    with pytest.raises(RuntimeError):
        relay.claim("two")
    upstream.socket.close()
    never_started = Relay(("127.0.0.1", 0), upstream.address)
    never_started.close()
    late = Relay(("127.0.0.1", 0), upstream.address)
    late.start()
    with connect(late):
        time.sleep(0.2)
        late.close()  # while it tries to reach a server
    assert not caplog.records


def send_until_closed(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            connection.sendall(bytes(100_000))


def ends(connection: socket.socket) -> bool:
    """Is over behind what is still to be read."""
    with contextlib.suppress(ConnectionError):
        while connection.recv(1 << 20):
            pass
    return True


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_each_flower_clients_bytes_are_its_own(tmp_path: Path, tls: bool) -> None:
    if tls:
        pytest.importorskip("cryptography", reason="makes the certificates of this test")
        from certificates import certificates

        certificates(tmp_path)
    server = party("server", str(tmp_path), *(["tls"] if tls else []))
    assert server.stdout is not None
    address = server.stdout.readline().strip()
    certificate = [str(tmp_path / "tls_ca.pem")] if tls else []
    sizes = (100_000, 900_000)  # values of four bytes; the server sends 400 000
    clients = [party("client", address, str(size), *certificate) for size in sizes]
    try:
        out = server.communicate(timeout=40)[0]
        assert [one.wait(10) for one in clients] == [0, 0]
    finally:
        for one in (server, *clients):
            one.kill()
            one.communicate()
    measured = json.loads(out.splitlines()[-1])
    for size in sizes:
        assert 4 * size < measured[str(size)]["sent"] < 4 * size * 1.02 + 20_000
        assert 1_600_000 < measured[str(size)]["received"] < 1_600_000 * 1.02 + 20_000
    assert sum(measured[str(size)]["sent"] for size in sizes) <= measured["total"]["sent"]


def party(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "flower_parties.py"), *words],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "FLWR_TELEMETRY_ENABLED": "0", "OMP_NUM_THREADS": "1"},
    )
