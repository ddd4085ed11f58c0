"""`python -m lora.federated`: a federated run on one machine, or its server or a client alone."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from importlib import import_module
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

from library.training.log import hush_imports
from utils.packages import missing_package

from .processes import begin_imports, clients_beside

if TYPE_CHECKING:
    from .server import Certificates
    from .settings import Settings

logger = logging.getLogger("lora.federated")

PACKAGES = ("transformers", "peft", "sklearn", "yaml", "matplotlib")

DESCRIPTION = """\
Train LoRA for CLIP on several clients that keep their pictures.

    python -m lora.federated --clients 4 --rounds 3
        server and clients as processes of this machine
    python -m lora.federated server --address 0.0.0.0:8080
    python -m lora.federated client --address HOST:8080 --number 0
        the same on several machines, each with the same configuration

A run that was stopped goes on from its last round with the same command.
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        "python -m lora.federated",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("role", nargs="?", choices=("all", "server", "client"), default="all")
    p.add_argument("--config", type=Path, help="YAML (default: configs/clip_lora.yaml)")
    p.add_argument("--output", type=Path, default=Path("output/federated"), help="the run's folder")
    p.add_argument("--address", help="host:port of the server (default: loopback)")
    p.add_argument("--number", type=int, help="which client this is, from 0")
    p.add_argument("--patience", type=seconds, default=60.0, help="seconds to look for the server")
    run = p.add_argument_group("over the file's `federated` section")
    run.add_argument("--clients", type=int)
    run.add_argument("--rounds", type=int)
    run.add_argument("--aggregation", help="fedavg, product or frozen_a")
    run.add_argument("--dirichlet_alpha", type=float, help="small: unlike shares")
    run.add_argument("--seed", type=int)
    run.add_argument("--optimizer", help="of the clients; any --optimizer_type of the trainer")
    run.add_argument("--learning_rate", type=float)
    run.add_argument("--batch_size", type=int)
    run.add_argument("--epochs", type=int, help="of a client in a round")
    run.add_argument("--min_clients", type=int)
    run.add_argument("--round_timeout", type=float, help="seconds")
    run.add_argument("--join_timeout", type=float, help="seconds")
    run.add_argument("--dp_noise", type=float, help="differential privacy: noise multiplier")
    run.add_argument("--dp_clip", type=float, help="differential privacy: norm to clip to")
    tls = p.add_argument_group("TLS (PEM files)")
    tls.add_argument("--tls_ca", type=Path, help="the authority's certificate")
    tls.add_argument("--tls_certificate", type=Path, help="the server's")
    tls.add_argument("--tls_key", type=Path, help="the server's")
    return p


def seconds(text: str) -> float:
    """A positive number."""
    value = float(text)
    if not 0 < value < inf:
        raise ValueError
    return value


SETTINGS = (
    "clients",
    "rounds",
    "aggregation",
    "dirichlet_alpha",
    "seed",
    "optimizer",
    "learning_rate",
    "batch_size",
    "epochs",
    "min_clients",
    "round_timeout",
    "join_timeout",
    "dp_noise",
    "dp_clip",
)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 2 for what the user can mend."""
    options = parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("lora").setLevel(logging.INFO)
    hush_imports()
    from library.training.errors import UserError

    try:
        return run(options)
    except (UserError, ValueError, ImportError) as error:
        print(f"lora.federated: {error}", file=sys.stderr)
        return 2


def check_packages() -> None:
    """Find what is missing before a run begins, and not at its end.

    Raises:
        ImportError: says what to install.
    """
    try:
        for name in PACKAGES:
            import_module(name)
    except ModuleNotFoundError as error:
        raise missing_package(error) from error


def quiet_libraries() -> None:
    """Leave the telling to this project's log: Flower's own names no clients. It sets up its logger
    when it is imported; gRPC reports every client that goes as an error."""
    from transformers.utils import logging as of_transformers

    of_transformers.disable_progress_bar()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    logging.getLogger("grpc._server").setLevel(logging.CRITICAL)


def run(options: argparse.Namespace) -> int:
    """What the command line asks for."""
    if options.role == "all":
        begin_imports()
    check_packages()
    quiet_libraries()
    from .settings import DEFAULT_CONFIG, Settings

    config = options.config or DEFAULT_CONFIG
    given = {name: getattr(options, name) for name in SETTINGS}
    settings = Settings.of_file(config, **given)
    if options.role == "client":
        return run_client(settings, options)
    from library.training.errors import UserError

    from .report import tell
    from .server import FederatedServer

    server = FederatedServer(
        settings,
        address_of(options.address or "127.0.0.1:0"),
        options.output,
        certificates(options),
    )
    if not server.rounds_left:
        logger.info("all %d rounds are done already; name another --output", settings.rounds)
        journal = server.journal
        journal.save()  # the history, too: a kill may have come between the two files
    elif options.role == "server":
        with server:
            journal = server.run()
    else:
        forwarded = [f"--{name}={value}" for name, value in given.items() if value is not None]
        forwarded += [f"--config={config.resolve()}", f"--patience={options.patience}"]
        if options.tls_ca:
            forwarded.append(f"--tls_ca={options.tls_ca.resolve()}")
        with server, clients_beside(server, forwarded):
            journal = server.run()
    tell(journal, server.full_bytes)
    if not any(one.clients for one in journal.rounds):
        raise UserError("No client has trained in any round; the log says why.")
    return 0


def run_client(settings: Settings, options: argparse.Namespace) -> int:
    """A client, until the server sends it home."""
    from grpc import RpcError

    from library.training.errors import UserError

    from .client import FederatedClient, serve

    if options.address is None or options.number is None:
        raise UserError("A client needs --address (of the server) and --number (from 0).")
    address_of(options.address)
    if not 0 <= options.number < settings.clients:
        raise UserError(f"--number {options.number}: the clients are 0 to {settings.clients - 1}.")
    authority = options.tls_ca
    if authority is not None and not authority.is_file():
        raise UserError(f"There is no certificate {authority}.")
    certificate = authority.read_bytes() if authority else None
    client = FederatedClient.of(settings, options.number)
    try:
        serve(client, options.address, certificate, options.patience)
    except RpcError as error:
        raise UserError(
            f"{client.name}: no server at {options.address} for {options.patience:g} s "
            f"({error.code().name}: {error.details()})."
        ) from error
    return 0


def certificates(options: argparse.Namespace) -> Certificates | None:
    """The files of a server's TLS.

    Raises:
        UserError: some of the three are not named.
    """
    from library.training.errors import UserError

    from .server import Certificates

    named = [options.tls_ca, options.tls_certificate, options.tls_key]
    if not any(named):
        return None
    if not all(named):
        raise UserError("TLS needs --tls_ca, --tls_certificate and --tls_key together.")
    return Certificates(*named)


def address_of(text: str) -> tuple[str, int]:
    """Host and port; an IPv6 host stands in brackets.

    Raises:
        UserError: it is none.
    """
    from library.training.errors import UserError

    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise UserError(f"--address {text!r} is not host:port, as 0.0.0.0:8080 is.")
    return host.strip("[]"), int(port)


if __name__ == "__main__":
    sys.exit(main())
