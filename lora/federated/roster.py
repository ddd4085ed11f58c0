"""Which clients are there, by name, and what each has sent and received."""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from contextlib import suppress
from queue import Empty, SimpleQueue

from flwr.common import GetPropertiesIns, Scalar
from flwr.server import SimpleClientManager
from flwr.server.client_proxy import ClientProxy

from .wire import Relay, Traffic

logger = logging.getLogger(__name__)

ASKING = 20.0  # seconds that a new client has for telling its name


class Roster(SimpleClientManager):
    """Flower's clients with names.

    Args:
        relay: through which they come.
        fingerprint: of all that does not travel; a client with another one would train something
            else, and is refused.

    Attributes:
        refused: by name, the clients that are not taken, and why.
    """

    def __init__(self, relay: Relay, fingerprint: str) -> None:
        super().__init__()
        self.relay, self.fingerprint = relay, fingerprint
        self.refused: dict[str, str] = {}
        self._names: dict[str, str] = {}
        self._left: dict[str, float] = {}
        self._told: dict[str, Traffic] = {}

    def register(self, client: ClientProxy) -> bool:
        """Called by Flower for each connection."""
        self.relay.claim(client.cid)
        return super().register(client)

    def unregister(self, client: ClientProxy) -> None:
        """Called by Flower when a connection has ended."""
        self._left.setdefault(client.cid, time.monotonic())
        super().unregister(client)

    def present(self) -> dict[str, ClientProxy]:
        """The clients that are there, by name; of one that has come twice the newer connection."""
        found: dict[str, ClientProxy] = {}
        for cid, proxy in list(self.clients.items()):
            name = self._names.get(cid) or self._ask(proxy)
            if name is not None and name not in self.refused:
                found[name] = proxy
        return dict(sorted(found.items()))

    def await_clients(self, number: int, seconds: float) -> dict[str, ClientProxy]:
        """Those that are there as soon as there are so many, or after some seconds."""
        deadline = time.monotonic() + seconds
        while True:
            found = self.present()
            if len(found) >= number or time.monotonic() > deadline:
                return found
            time.sleep(0.05)

    def name(self, cid: str) -> str:
        """What the client of a connection is called."""
        return self._names[cid]

    def left_at(self, cid: str) -> float | None:
        """When a connection ended, on the monotonic clock."""
        return self._left.get(cid)

    def traffic(self) -> dict[str, Traffic]:
        """What each client has sent and received since this was last asked."""
        moved: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for cid, name in self._names.items():
            now, before = self.relay.traffic(cid), self._told.get(cid, Traffic(0, 0))
            moved[name][0] += now.sent - before.sent
            moved[name][1] += now.received - before.received
            self._told[cid] = now
        return {name: Traffic(*numbers) for name, numbers in sorted(moved.items())}

    def _ask(self, proxy: ClientProxy) -> str | None:
        """A new client's name; None for one that has gone meanwhile.

        In a thread of its own: Flower can wait for ever for a client that goes while it comes.
        """
        answers: SimpleQueue[dict[str, Scalar]] = SimpleQueue()

        def ask() -> None:
            # Whatever Flower raises when a connection ends: there is no answer then.
            with suppress(Exception):
                answers.put(proxy.get_properties(GetPropertiesIns({}), ASKING, None).properties)
            answers.put({})

        threading.Thread(target=ask, daemon=True).start()
        try:
            told = answers.get(timeout=2 * ASKING)
        except Empty:
            told = {}
        if not told:
            logger.info("a client has left before it told its name")
            return None
        name = str(told.get("name", f"client without a name ({proxy.cid[:6]})"))
        self._names[proxy.cid] = name
        if told.get("fingerprint") != self.fingerprint:
            self.refused[name] = (
                "it has another base model, other targets or another frozen A than the server: "
                "both need the same `model` and `lora` sections and the same weights"
            )
            logger.warning("%s is left out: %s", name, self.refused[name])
        else:
            self.refused.pop(name, None)
        return name
