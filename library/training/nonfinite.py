"""What is said when a run's numbers turn NaN or infinite."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from library.training.errors import UserError

NAMED_AT_MOST = 5


class NonFiniteError(UserError):
    """Loss, gradients or weights are NaN or infinite; the last good files are untouched."""

    @classmethod
    def at(
        cls, step: int, pictures: Iterable[str], network: nn.Module, detail: str = ""
    ) -> NonFiniteError:
        """The error of `step`: its pictures, and the tensors of `network` that are not finite."""
        bad = [name for name, p in network.named_parameters() if _bad(p)]
        bad += [f"{name} (gradient)" for name, p in network.named_parameters() if _bad(p.grad)]
        if bad and not detail:
            more = f" and {len(bad) - NAMED_AT_MOST} more" if len(bad) > NAMED_AT_MOST else ""
            detail = f"Not finite: {', '.join(bad[:NAMED_AT_MOST])}{more}."
        return cls(
            f"training stopped at step {step}: loss or gradients are NaN or infinite. {detail}\n"
            f"Pictures of the step: {', '.join(dict.fromkeys(pictures))}\n"
            "Files saved before are as they were. What helps: a lower --learning_rate; "
            "--no_half_vae with a model in fp16; --mixed_precision bf16 instead of fp16; leaving "
            "out the pictures named here."
        )


def _bad(tensor: Tensor | None) -> bool:
    return tensor is not None and not bool(torch.isfinite(tensor).all())
