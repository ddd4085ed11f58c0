"""Whether AdaptiveHinaAdamW finds which halves of SDXL's LoRA are partners, and what it costs.

    python benchmarks/relations.py                # 986 modules, 200 steps: two minutes
    python benchmarks/relations.py --modules 100 --rank 4

Each module of the LoRA learns a teacher of rank 4 by gradients that flow through B·A; modules of
one width share their inputs, as the projections of an attention block do. The teachers' sizes
differ by a hundred. AdaptiveHinaAdamW with all defaults takes its steps in turn with torch's fused
AdamW on copies with the same gradients; its mean step, discoveries included, is compared with the
other's.

Then true partners are counted: by the compatibility that is usual (shapes, and the correlation of
entries) alone; in the run and after it, by discovery without names; the same on gradients rounded
to bfloat16; and by discovery with names.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # `library`, which is not installed

import torch
import workload
from fresh_process import Peak
from machine import describe_machine, in_words
from optimizer_step import print_table
from torch import Tensor
from torch.nn import Parameter

from library.custom_hina_adaptive_adamw_optimizer import AdaptiveHinaAdamW
from library.optim.discovery import discover, product_norms
from library.optim.scratch import ScratchPool

LR = 1e-3
TEACHER_RANK = 4
BATCH = 8


class Modules:
    """A LoRA's halves and what they are to learn."""

    def __init__(self, modules: int | None, rank: int) -> None:
        workload.RANK = rank
        shapes = list(workload.sdxl_lora(modules).items())
        self.rank = rank
        self._random = torch.Generator().manual_seed(0)
        self.parameters: dict[str, Parameter] = {}
        self.teachers: list[tuple[Tensor, Tensor]] = []
        for (down, (_, wide_in)), (up, (wide_out, _)) in zip(
            shapes[::2], shapes[1::2], strict=True
        ):
            # As kohya's LoRA begins: A uniform, B zero.
            limit = (3 / wide_in) ** 0.5 / 3**0.5
            uniform = torch.rand(rank, wide_in, generator=self._random)
            self.parameters[down] = Parameter((2 * uniform - 1) * limit)
            self.parameters[up] = Parameter(torch.zeros(wide_out, rank))
            size = 10 ** float(torch.rand(1, generator=self._random) * 2 - 2)
            self.teachers.append((self._draw(wide_out, TEACHER_RANK, size), self._draw(4, wide_in)))

    def _draw(self, rows: int, columns: int, size: float = 1.0) -> Tensor:
        return torch.randn(rows, columns, generator=self._random) * (size / columns**0.5)

    def halves(self) -> list[tuple[Parameter, Parameter]]:
        params = list(self.parameters.values())
        return list(zip(params[::2], params[1::2], strict=True))

    def backward(self) -> float:
        """Gradients of one batch; returns the loss."""
        inputs: dict[int, Tensor] = {}
        total = torch.zeros(())
        for (a, b), (teacher_b, teacher_a) in zip(self.halves(), self.teachers, strict=True):
            wide_in = a.shape[1]
            if wide_in not in inputs:
                inputs[wide_in] = torch.randn(BATCH, wide_in, generator=self._random)
            x = inputs[wide_in]
            wanted = x @ teacher_a.mT @ teacher_b.mT
            total = total + (x @ a.mT @ b.mT - wanted).square().mean()
        for parameter in self.parameters.values():
            parameter.grad = None
        torch.autograd.backward(total)
        return float(total.detach())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--modules", type=int, help="this many of the 986, drawn at random")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(in_words(describe_machine("cpu", arguments.threads)), end="\n\n", flush=True)
    modules = Modules(arguments.modules, arguments.rank)
    optimizer = train(modules, arguments.steps)
    modules.backward()
    tell_found(modules, optimizer)
    tell_cost(modules)
    return 0


def train(modules: Modules, steps: int) -> AdaptiveHinaAdamW:
    """Steps in turn with fused AdamW."""
    params = list(modules.parameters.values())
    optimizer = AdaptiveHinaAdamW(params, lr=LR)
    copies = [Parameter(p.detach().clone()) for p in params]
    reference = torch.optim.AdamW(copies, lr=LR, fused=True)
    ours, theirs, losses = [], [], []
    for _ in range(steps):
        losses.append(modules.backward())
        for copy, param in zip(copies, params, strict=True):
            copy.grad = param.grad
        started = time.perf_counter()
        reference.step()
        between = time.perf_counter()
        optimizer.step()
        theirs.append(between - started)
        ours.append(time.perf_counter() - between)
    first = 5  # compiles, and what each allocates at first
    print(f"loss {losses[0]:.3f} → {losses[-1]:.3f} in {steps} steps\n")
    mean = statistics.mean(ours[first:]) / statistics.mean(theirs[first:])
    size = sum(p.numel() for p in params)
    held = sum(
        t.nbytes
        for entry in optimizer.state.values()
        for t in entry.values()
        if isinstance(t, Tensor)
    )
    importance = optimizer.get_importance_analysis()["importance_statistics"]
    rows = [
        ["mean step, ms", f"{1000 * statistics.mean(ours[first:]):.1f}"],
        ["the same × fused AdamW", f"{mean:.2f}"],
        ["slowest step, ms", f"{1000 * max(ours[first:]):.0f}"],
        ["state, bytes a parameter", f"{held / size:.2f}"],
        ["mean importance", f"{importance['mean']:.6f}"],
        ["mean effective lr ÷ (lr × mean lr_mask)", f"{effective_lr(optimizer):.3f}"],
        ["the same, relations aside", f"{effective_lr(optimizer, relations=False):.3f}"],
    ]
    print_table([f"{len(params)} tensors, {size / 1e6:.1f} M parameters", "all on"], rows)
    return optimizer


def effective_lr(optimizer: AdaptiveHinaAdamW, relations: bool = True) -> float:
    """The mean over tensors of what acted in the last step, by what lr_mask alone would give."""
    told = optimizer.get_relationship_summary()["relationships"]
    scale = {one["param_index"]: relation_factor(one) for one in told} if not relations else {}
    acted = torch.zeros(len(optimizer.roles.position), dtype=torch.float64)
    for batch, record in zip(optimizer._batches, optimizer.last_step, strict=True):
        acted[batch.position_index] = record.values["effective_lr"]
    scales = torch.tensor([scale.get(index, 1.0) for index in range(len(acted))])
    masks = [one["avg_lr_scale"] for one in optimizer.get_lr_mask_analysis()["parameter_analysis"]]
    return float((acted / scales).mean()) / (LR * statistics.mean(masks))


def relation_factor(relation: dict[str, Any]) -> float:
    return float((1 + 0.2 * relation["compatibility"]) / (1 + 0.1 * relation["product_norm"]))


def tell_found(modules: Modules, optimizer: AdaptiveHinaAdamW) -> None:
    params = list(modules.parameters.values())
    matrices = [p.detach() for p in params]
    grads = [p.grad for p in params if p.grad is not None]
    rounded = [grad.bfloat16().float() for grad in grads]
    known = [(2 * k + 1, 2 * k) for k in range(len(params) // 2)]
    pool = ScratchPool()

    def partners(gradients: list[Tensor], named: list[tuple[int, int]]) -> dict[int, int]:
        found = discover(matrices, gradients, named, 0.3, pool)
        return {one: relation.partner for one, relation in found.items()}

    told = optimizer.get_relationship_summary()["relationships"]
    in_run = {one["param_index"]: one["partner_index"] for one in told}
    rows = [
        found_row("shapes and entries alone", usual(matrices), len(params)),
        found_row("in the run, without names", in_run, len(params)),
        found_row("at the end, without names", partners(grads, []), len(params)),
        found_row("the same, gradients in bfloat16", partners(rounded, []), len(params)),
        found_row("with names", partners(grads, known), len(params)),
    ]
    print_table(["partners found", "true pairs", "halves with a wrong one"], rows)


def found_row(label: str, partner: dict[int, int], count: int) -> list[str]:
    """How many pairs (2k, 2k + 1) are each other's partners."""
    pairs = sum(partner.get(k) == k + 1 and partner.get(k + 1) == k for k in range(0, count, 2))
    wrong = sum(other != one ^ 1 for one, other in partner.items())
    return [label, f"{pairs} of {count // 2} ({200 * pairs / count:.1f} %)", str(wrong)]


def usual(matrices: list[Tensor]) -> dict[int, int]:
    """Partners by 0.7·(share of fitting products) + 0.3·|correlation| alone, best above 0.3. The
    correlation is that of the first thousand entries, enough to be told from none."""
    rows = torch.tensor([m.shape[0] for m in matrices])
    columns = torch.tensor([m.shape[1] for m in matrices])
    fits = [columns.unsqueeze(1) == rows, rows.unsqueeze(1) == columns]
    fits += [columns.unsqueeze(1) == columns, rows.unsqueeze(1) == rows]
    fitting = torch.stack(fits).sum(0) / len(fits)
    length = min(1000, *(m.numel() for m in matrices))
    sample = torch.stack([m.flatten()[:length] for m in matrices])
    worth = 0.7 * fitting + 0.3 * torch.corrcoef(sample).nan_to_num().abs()
    worth.fill_diagonal_(0)
    best, partner = worth.max(1)
    return {k: int(partner[k]) for k in range(len(matrices)) if best[k] > 0.3}


def tell_cost(modules: Modules) -> None:
    params = list(modules.parameters.values())
    matrices = [p.detach() for p in params]
    grads = [p.grad for p in params if p.grad is not None]
    noise = [torch.randn_like(p) * 1e-3 for p in matrices]
    rows = [
        ["partners found by short traces", *cost_of_discovery(matrices, grads)],
        ["nothing to find (random gradients)", *cost_of_discovery(matrices, noise)],
    ]
    head = [f"discovery in {len(params)} matrices", "s", "MiB at its peak", "MiB kept"]
    print_table(head, rows)


def cost_of_discovery(matrices: list[Tensor], grads: list[Tensor]) -> list[str]:
    """Seconds, and memory at the peak and kept for the next time."""
    pool = ScratchPool()
    times = []
    for _ in range(5):
        with Peak() as peak:
            started = time.perf_counter()
            product_norms(matrices, discover(matrices, grads, [], 0.3, pool))
            times.append(time.perf_counter() - started)
    kept = pool.stats()["estimated_memory_mb"]
    return [f"{statistics.median(times):.2f}", f"{peak.mebibytes:.0f}", f"{kept:.1f}"]


if __name__ == "__main__":
    sys.exit(main())
