"""What a run has come to: a table for the terminal and a picture."""

from __future__ import annotations

from pathlib import Path

from .journal import Journal, Round

PICTURE = "rounds.png"


def tell(journal: Journal, full: int) -> None:
    """Print bytes beside the whole model's, and draw the rounds.

    Args:
        full: bytes of the whole model.
    """
    print(f"\naccuracy by round: {', '.join(f'{one.accuracy:.3f}' for one in journal.rounds)}")
    rounds = [one for one in journal.rounds if one.number]
    up, down = (_mean_bytes(rounds, way) for way in ("sent", "received"))
    if full and up:
        less = 1 - max(up, down) / full
        print(
            f"a client and round: {up / 1e6:.3f} MB sent, {down / 1e6:.3f} MB received; the whole "
            f"model is {full / 1e6:.3f} MB{f': {less:.1%} less' if less > 0 else ''}"
        )
    for one in rounds:
        for name, why in one.left_out.items():
            print(f"round {one.number}: {name} was left out: {why}")
    picture = draw(journal.rounds, full, journal.folder / PICTURE)
    print(f"adapter, history and picture: {journal.folder} ({picture.name})")


def draw(rounds: list[Round], full: int, file: Path) -> Path:
    """Accuracy and bytes by round, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([one.number for one in rounds], [one.accuracy for one in rounds], "o-")
    left.set(xlabel="round", ylabel="accuracy on test pictures", ylim=(0, 1))
    left.set_xticks([one.number for one in rounds])
    left.grid(alpha=0.3)
    trained = [one for one in rounds if one.number]
    for way, shift in (("sent", -0.2), ("received", 0.2)):
        heights = [_mean_bytes([one], way) / 1e6 for one in trained]
        bars = right.bar([one.number + shift for one in trained], heights, 0.4, label=way)
        right.bar_label(bars, fmt="%.3g", fontsize=7)
    right.axhline(full / 1e6, color="grey", linestyle="--", label="the whole model")
    right.set(xlabel="round", ylabel="MB of a client")
    right.set_xticks([one.number for one in trained])
    right.legend()
    figure.savefig(file, dpi=110)
    return file


def _mean_bytes(rounds: list[Round], way: str) -> float:
    """Bytes of those clients that took part in a round, the mean over clients and rounds."""
    moved = [one.traffic[name][way] for one in rounds for name in one.clients]
    return sum(moved) / len(moved) if moved else 0.0
