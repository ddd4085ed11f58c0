"""What a federated run is set up with: the `federated` section of a YAML file, and the command line
over it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from library.optim.arguments import (
    Rule,
    check_keys,
    check_values,
    number,
    one_of,
    plain,
    whole_number,
)
from library.training.errors import UserError
from utils.model_factory import read_sections

from .aggregation import AGGREGATIONS

DEFAULT_CONFIG = Path(__file__).parents[2] / "configs" / "clip_lora.yaml"

RULES: dict[str, Rule] = {
    "clients": whole_number(1),
    "rounds": whole_number(1),
    "aggregation": one_of(*AGGREGATIONS),
    "dirichlet_alpha": number(0, open_low=True),
    "seed": whole_number(0, 2**32 - 1),  # NumPy's
    "learning_rate": number(0, open_low=True),
    "batch_size": whole_number(1),
    "epochs": whole_number(1),
    "min_clients": whole_number(1),
    "round_timeout": number(0, open_low=True),
    "join_timeout": number(0, open_low=True),
    "dp_noise": number(0),
    "dp_clip": number(0, open_low=True),
    "optimizer_args": Rule(lambda value: isinstance(value, Mapping), "names and values"),
}
_FREE_TO_CHANGE = ("rounds", "min_clients", "round_timeout", "join_timeout")


@dataclass(frozen=True)
class Settings:
    """A federated run.

    Attributes:
        model: the sections `model` and `lora`, for `utils.model_factory.create_model`.
        clients: how many take part; client k has the k-th share of the pictures.
        rounds: how often the server hands out an adapter and averages what comes back.
        aggregation: `fedavg`, `product` or `frozen_a` (`aggregation`).
        dirichlet_alpha: how alike the clients' shares are; small is unlike.
        seed: of shares, of the adapter's first values and of the order of pictures.
        optimizer, optimizer_args, learning_rate, batch_size, epochs: a client's training in a
            round; any name that the trainer's `--optimizer_type` takes.
        min_clients: with fewer sound answers a round leaves the adapter as it was.
        round_timeout: seconds that a client has for a round.
        join_timeout: seconds to wait for all clients before the first round, and for `min_clients`
            of them before any other.
        dp_noise, dp_clip: central differential privacy by Flower: each client's change is clipped
            to the norm `dp_clip`, and noise of `dp_noise` times that, divided by the number of
            clients, is added to the mean. 0 is off.

    Raises:
        OptimizerArgumentError: (a ValueError) an impossible value; names it and what is allowed.
    """

    model: Mapping[str, Any]
    clients: int = 4
    rounds: int = 3
    aggregation: str = "fedavg"
    dirichlet_alpha: float = 0.5
    seed: int = 0
    optimizer: str = "HinaAdamW"
    optimizer_args: Mapping[str, Any] = field(default_factory=dict)
    learning_rate: float = 3e-3
    batch_size: int = 16
    epochs: int = 4
    min_clients: int = 1
    round_timeout: float = 300.0
    join_timeout: float = 120.0
    dp_noise: float = 0.0
    dp_clip: float = 1.0

    def __post_init__(self) -> None:
        check_values(RULES, {name: plain(value) for name, value in vars(self).items()}, "federated")
        if self.min_clients > self.clients:
            raise UserError(
                f"federated: min_clients={self.min_clients} is more than clients={self.clients}."
            )
        if self.dp_noise and self.model.get("lora", {}).get("save_only_trainable") is False:
            raise UserError(
                "federated: differential privacy clips what is trained; with it the whole model "
                "cannot travel (lora: save_only_trainable: false)."
            )
        if self.dp_noise and self.aggregation == "product":
            raise UserError(
                "federated: the noise of differential privacy is measured for a mean, and "
                "aggregation 'product' is none. Use 'fedavg' or 'frozen_a', or dp_noise: 0."
            )

    @classmethod
    def of_file(cls, path: Path, **given: Any) -> Settings:
        """A file's settings, with those that are `given` and not None over them. Another optimizer
        than the file's comes without the `optimizer_args` that are meant for that one.

        Raises:
            UserError: no such file, or it cannot be read; OptimizerArgumentError: see the class.
        """
        sections = read_sections(path)
        own = dict(sections.pop("federated", {}))
        check_keys(
            [one.name for one in fields(cls) if one.name != "model"], own, f"{path}: federated"
        )
        own.setdefault("optimizer", cls.optimizer)
        if given.get("optimizer") not in (None, own["optimizer"]):
            own.pop("optimizer_args", None)
        own |= {name: value for name, value in given.items() if value is not None}
        model = {name: dict(section) for name, section in sections.items()}
        lora = model.setdefault("lora", {})
        lora.setdefault("seed", own.get("seed", 0))
        if own.get("aggregation") == "frozen_a" and not lora.setdefault("freeze_a", True):
            raise UserError(f"{path}: aggregation 'frozen_a' needs lora: freeze_a: true.")
        return cls(model=model, **own)

    def agreed(self) -> dict[str, Any]:
        """What a client and its server must have alike and no weights tell: who has which pictures,
        and how they are trained on."""
        own = {"model", "aggregation", "dp_noise", "dp_clip", *_FREE_TO_CHANGE}
        shared = {name: value for name, value in self.as_dict().items() if name not in own}
        return shared | {"lora_dropout": self.model.get("lora", {}).get("lora_dropout")}

    def unlike(self, earlier: Mapping[str, Any]) -> list[str]:
        """What differs from the settings of a run that is to be continued, and may not."""
        now = self.as_dict()
        return [
            f"{name} was {earlier.get(name)!r}, now {value!r}"
            for name, value in now.items()
            if name not in _FREE_TO_CHANGE and earlier.get(name) != value
        ]

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    def but(self, **changed: Any) -> Settings:
        """The same, with some set otherwise."""
        return replace(self, **changed)
