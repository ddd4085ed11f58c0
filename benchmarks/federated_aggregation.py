"""Ways of averaging LoRA over clients, compared: accuracy by round on the shipped tiny CLIP.

    python benchmarks/federated_aggregation.py --json runs.json

Clients train one after the other in this process, with the code that clients of a real run have;
what travels and how it is averaged is the same, only Flower and the wire are left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lora.federated.aggregation import AGGREGATIONS, product_error
from lora.federated.client import FederatedClient
from lora.federated.data import shares
from lora.federated.settings import DEFAULT_CONFIG, Settings

# lr_mask starts anew in each round, far below any learning rate: half a thousand steps never come.
ARGUMENTS = {"AdaptiveHinaAdamW": {"use_lr_mask": False}}
LEARNING_RATES = {"AdamW": 3e-3, "HinaAdamW": 3e-3, "AdaptiveHinaAdamW": 3e-2}


@dataclass
class Course:
    """One run: what it was, test accuracy by round, and how far FedAvg's product was from the mean
    of products in the first and in the last round."""

    aggregation: str
    dirichlet_alpha: float
    optimizer: str
    seed: int
    learning_rate: float
    accuracies: list[float]
    errors: list[float]


def course(settings: Settings) -> Course:
    """A run in this process."""
    clients = [FederatedClient.of(settings, k) for k in range(settings.clients)]
    test = shares(clients[0].model.image_size).test
    server = clients[0].model
    tensors = server.adapter_state()
    combine = AGGREGATIONS[settings.aggregation]
    accuracies, errors = [], []
    for number in range(1, settings.rounds + 1):
        updates = []
        for client in clients:
            arrays, count, _ = client.fit(list(tensors.values()), {"round": number})
            updates.append((float(count), dict(zip(tensors, arrays, strict=True))))
        tensors = combine(updates)
        if settings.aggregation != "frozen_a":
            errors.append(product_error(updates, tensors))
        server.set_parameters(list(tensors.values()))
        accuracies.append(server.evaluate(test.images, test.labels)["accuracy"])
    return Course(
        settings.aggregation,
        settings.dirichlet_alpha,
        settings.optimizer,
        settings.seed,
        settings.learning_rate,
        accuracies,
        errors,
    )


def courses(options: argparse.Namespace) -> Iterator[Course]:
    """All combinations."""
    every = itertools.product(
        options.alphas, options.optimizers, options.aggregations, range(options.seeds)
    )
    for alpha, optimizer, aggregation, seed in every:
        settings = Settings.of_file(
            DEFAULT_CONFIG,
            dirichlet_alpha=alpha,
            optimizer=optimizer,
            optimizer_args=ARGUMENTS.get(optimizer),
            aggregation=aggregation,
            seed=options.first_seed + seed,
            rounds=options.rounds,
            clients=options.clients,
            learning_rate=options.learning_rate or LEARNING_RATES[optimizer],
            epochs=options.epochs,
        )
        yield course(settings)


def table(done: list[Course]) -> str:
    """Mean and range over seeds of the accuracy behind some rounds, in Markdown."""
    rounds = len(done[0].accuracies)
    shown = sorted({3, rounds} & set(range(1, rounds + 1)) | {rounds})
    columns = " | ".join(f"round {number}" for number in shown)
    lines = [f"| Dirichlet | clients' optimizer | aggregation | {columns} | error of B·A |"]
    lines.append("|" + " --- |" * (4 + len(shown)))
    groups: dict[tuple[float, str, str], list[Course]] = {}
    for one in done:
        key = (one.dirichlet_alpha, one.optimizer, one.aggregation)
        groups.setdefault(key, []).append(one)
    for (alpha, optimizer, aggregation), runs in groups.items():
        cells = []
        for number in shown:
            found = [one.accuracies[number - 1] for one in runs]
            cells.append(f"{statistics.mean(found):.3f} ({min(found):.3f}–{max(found):.3f})")
        errors = [error for one in runs for error in one.errors]
        cells.append(f"{statistics.mean(errors):.1%}" if errors else "0")
        lines.append(f"| {alpha:g} | {optimizer} | {aggregation} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.1, 1.0])
    parser.add_argument("--optimizers", nargs="+", default=list(LEARNING_RATES))
    parser.add_argument("--aggregations", nargs="+", default=list(AGGREGATIONS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, help="for all optimizers")
    parser.add_argument("--json", type=Path, help="write all accuracies here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    done = []
    for one in courses(options):
        done.append(one)
        print(one.dirichlet_alpha, one.optimizer, one.aggregation, one.seed, one.accuracies[-1])
        sys.stdout.flush()
    print(table(done))
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in done], indent=1))


if __name__ == "__main__":
    main()
