"""The server of a run."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from flwr.server import ServerConfig, start_server

from library.training.errors import UserError

from .client import MESSAGE, FederatedClient
from .data import dirichlet, shares
from .journal import Journal
from .model import lora_model
from .roster import Roster
from .settings import Settings
from .strategy import Rounds
from .wire import Relay, free_port

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Certificates:
    """Files of Flower's own TLS, in PEM: the authority's certificate, the server's and its key."""

    authority: Path
    server: Path
    key: Path

    def read(self) -> tuple[bytes, bytes, bytes]:
        """Their contents.

        Raises:
            UserError: one is not there.
        """
        for path in (self.authority, self.server, self.key):
            if not path.is_file():
                raise UserError(f"There is no certificate or key {path}.")
            if b"-----BEGIN " not in path.read_bytes():
                raise UserError(f"{path} is no certificate or key in PEM.")
        return self.authority.read_bytes(), self.server.read_bytes(), self.key.read_bytes()


class FederatedServer:
    """Leads a run from where its folder says that it stands; a context that holds the address.

    Flower itself listens on loopback; clients come through a relay that counts bytes.

    Args:
        address: where clients come to; port 0 takes a free one.
        folder: the run's.
    """

    def __init__(
        self,
        settings: Settings,
        address: tuple[str, int],
        folder: Path,
        certificates: Certificates | None = None,
    ) -> None:
        self.settings = settings
        self.certificates = certificates.read() if certificates else None
        self.model = lora_model(settings)
        self._try_out()
        self.journal = Journal.of_folder(folder, settings, self.model.adapter_state())
        self.full_bytes = 4 * self.model.count_parameters()[1]  # float32, as it travels
        self._inner = free_port()
        self.relay = Relay(address, ("127.0.0.1", self._inner))

    def _try_out(self) -> None:
        """What would fail in every client, before any is waited for: optimizer and shares.

        Raises:
            ValueError, UserError: says what is wrong.
        """
        settings, pictures = self.settings, shares(self.model.image_size).clients
        dirichlet(pictures.labels, settings.clients, settings.dirichlet_alpha, settings.seed)
        FederatedClient(settings, 0, self.model, pictures).make_optimizer(
            self.model.trainable_parameters()
        )

    @property
    def rounds_left(self) -> int:
        """How many rounds are still to come."""
        return max(0, self.settings.rounds - self.journal.last)

    def __enter__(self) -> FederatedServer:
        self.relay.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.relay.close()

    @property
    def address(self) -> str:
        """Where clients come to."""
        host, port = self.relay.address
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def run(self) -> Journal:
        """All rounds that are left; returns when the last is saved and the clients are sent home.

        Raises:
            UserError: too few clients.
        """
        if self.journal.last:
            logger.info("going on behind round %d", self.journal.last)
        test = shares(self.model.image_size).test
        roster = Roster(self.relay, self.model.fingerprint(), self.settings)
        logger.info("waiting for %d clients at %s", self.settings.clients, self.address)
        try:
            start_server(
                server_address=f"127.0.0.1:{self._inner}",
                config=ServerConfig(
                    num_rounds=self.rounds_left, round_timeout=self.settings.round_timeout
                ),
                strategy=Rounds(self.settings, self.model, test, roster, self.journal),
                client_manager=roster,
                certificates=self.certificates,
                grpc_max_message_length=MESSAGE,
            )
        except SystemExit as stop:  # Flower's answer to Ctrl-C and SIGTERM, with status 0
            logger.warning("stopped; the same command goes on behind round %d", self.journal.last)
            raise SystemExit(130) from stop
        return self.journal
