"""Which clients are there, by name, and what each has sent and received."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

from flwr.common import GetPropertiesIns, Scalar
from flwr.server import SimpleClientManager
from flwr.server.client_proxy import ClientProxy

from .client import name_of
from .settings import Settings
from .wire import Relay, Traffic

logger = logging.getLogger(__name__)

ASKING = 20.0  # seconds that a new client has for telling its name


class Roster(SimpleClientManager):
    """Flower's clients with names.

    Args:
        relay: through which they come.
        fingerprint: of all that does not travel; a client with another one would train something
            else, and is refused.
        settings: a client with others that matter (`Settings.agreed`), or with a name that is not
            of the run, is refused too.

    Attributes:
        refused: by name, the clients that are there and not taken, and why.
    """

    def __init__(self, relay: Relay, fingerprint: str, settings: Settings) -> None:
        super().__init__()
        self.relay, self.fingerprint, self.settings = relay, fingerprint, settings
        self.refused: dict[str, str] = {}
        self._unfit: dict[str, str] = {}
        self._gone: set[str] = set()
        self._twice: set[str] = set()
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
        refused: dict[str, str] = {}
        for cid, proxy in list(self.clients.items()):
            name = self._names.get(cid) or (None if cid in self._gone else self._ask(proxy))
            if name is None:
                continue
            if cid in self._unfit:
                refused[name] = self._unfit[cid]
                continue
            if name in found and cid not in self._twice:
                self._twice.add(cid)
                logger.warning("%s is there twice: the one that came last counts", name)
            found[name] = proxy
        self.refused = {name: why for name, why in refused.items() if name not in found}
        return dict(sorted(found.items()))

    def await_clients(self, number: int, seconds: float) -> dict[str, ClientProxy]:
        """Those that are there as soon as there are so many, or after some seconds."""
        deadline = time.monotonic() + seconds
        while True:
            found = self.present()
            if len(found) >= number or time.monotonic() > deadline:
                return found
            time.sleep(0.05)

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
            self._gone.add(proxy.cid)
            return None
        name = str(told.get("name", f"client without a name ({proxy.cid[:6]})"))
        self._names[proxy.cid] = name
        if problem := self._problem_of(name, told):
            self._unfit[proxy.cid] = problem
            logger.warning("%s is left out: %s", name, problem)
        return name

    def _problem_of(self, name: str, told: Mapping[str, Scalar]) -> str | None:
        if name not in map(name_of, range(self.settings.clients)):
            return f"the run has {self.settings.clients} clients, of which it is none"
        if told.get("fingerprint") != self.fingerprint:
            return (
                "it has another base model, other targets or another frozen A than the server: "
                "both need the same `model` and `lora` sections and the same weights"
            )
        ours, theirs = self.settings.agreed(), _mapping(told.get("settings"))
        differing = [
            f"{key} is {theirs.get(key)!r} there and {value!r} here"
            for key, value in ours.items()
            if theirs.get(key) != value
        ]
        return f"its settings are others: {'; '.join(differing)}" if differing else None


def _mapping(told: object) -> dict[str, Any]:
    """What JSON holds, if that is names and values."""
    try:
        found = json.loads(str(told))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
