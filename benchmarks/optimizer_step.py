"""How long `optimizer.step()` takes on the LoRA of SDXL, and how much memory, beside its peers.

    python benchmarks/optimizer_step.py                     # every optimizer that is installed
    python benchmarks/optimizer_step.py --json speed.json --chart speed.svg
    python benchmarks/optimizer_step.py --scaling --tensors --compile --memory
    python benchmarks/optimizer_step.py --device cuda       # adds kernels launched per step
    python benchmarks/optimizer_step.py --list              # the optimizers, and which can run

The tensors are those of a LoRA of rank 16 on SDXL's 986 linear modules: 1972 tensors, 57.0 M
parameters, float32. Each optimizer takes its steps in turn with torch's fused AdamW, in the same
process and on gradients that change from step to step, and its ratio is the median over the rounds
of the one's time over the other's. The fused AdamW is also measured against a second one: how far
that is from 1 is what the machine's noise does to a ratio.

`state` is the bytes of the tensors in the optimizer's `state`; `held` of all that it keeps from
step to step. torchao compiles one function for each shape of tensor when it is measured for the
first time, which takes two minutes of the five that everything takes on two cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # `library`, which is not installed

import numpy as np
import torch
from bar_chart import Bar, bar_chart
from contenders import BY_KEY, CONTENDERS, REFERENCE, Contender
from fresh_process import compile_cost, peak_memory
from machine import describe_machine, in_words
from stopwatch import Plan, Runner, compare, warm_reference
from workload import (
    Shapes,
    Workload,
    lora_in_tensors,
    sdxl_lora,
    sdxl_lora_of_size,
    size_of,
)

Result = dict[str, Any]

BUSY = 0.5  # programs that want a core before anything is measured


def main(words: list[str] | None = None) -> int:
    arguments = parse(words)
    torch.set_num_threads(arguments.threads)
    if arguments.list:
        for contender in CONTENDERS:
            print(f"{contender.key:16}{contender.label:34}{contender.obstacle() or 'can run'}")
        return 0
    told: Result = {"machine": describe_machine(arguments.device, arguments.threads)}
    print(in_words(told["machine"]), end="\n\n", flush=True)
    if told["machine"]["load"] > BUSY:
        print(
            f"Other programs are running (load {told['machine']['load']}), and even ratios are "
            "far off then: measure again when they are done.\n",
            file=sys.stderr,
        )
    if arguments.speed:
        told |= measure_speed(arguments)
    if arguments.scaling is not None:
        told["scaling"] = measure_scaling(arguments)
    if arguments.tensors is not None:
        told["tensors"] = measure_tensors(arguments)
    if arguments.compile is not None:
        told["compile"] = measure_compiling(arguments)
    if arguments.memory:
        told["memory"] = measure_memory(arguments)
    if arguments.mean is not None:
        told["mean"] = measure_mean(arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", "utf-8")
    if arguments.chart:
        arguments.chart.write_text(draw(told), "utf-8")
    return 0


def parse(words: list[str] | None) -> argparse.Namespace:
    description, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what to measure (by default: --speed)")
    what.add_argument("--speed", action="store_true", help="each optimizer on the whole LoRA")
    what.add_argument(
        "--scaling", nargs="*", type=float, metavar="M", help="sizes in millions of parameters"
    )
    what.add_argument(
        "--tensors", nargs="*", type=int, metavar="N", help="counts of tensors of the same total"
    )
    what.add_argument(
        "--compile", nargs="?", type=int, const=300, metavar="STEPS", help="compiling, in STEPS"
    )
    what.add_argument(
        "--mean",
        nargs="?",
        type=int,
        const=200,
        metavar="STEPS",
        help="the mean over STEPS steps: for what an optimizer does not do at every step",
    )
    what.add_argument("--memory", action="store_true", help="peak of memory in a step (Linux)")
    how = parser.add_argument_group("how")
    how.add_argument("--only", nargs="+", choices=list(BY_KEY), metavar="KEY", help="see --list")
    how.add_argument("--modules", type=int, help="this many of the 986 modules, drawn at random")
    how.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    how.add_argument("--threads", type=int, default=2)
    how.add_argument("--warmup", type=int, default=Plan.warmup, help="steps that do not count")
    how.add_argument("--rounds", type=int, default=Plan.rounds, help="at most")
    how.add_argument("--seconds", type=float, default=Plan.seconds, help="for each optimizer")
    how.add_argument("--list", action="store_true", help="name the optimizers and end")
    out = parser.add_argument_group("output beside the tables")
    out.add_argument("--json", type=Path, metavar="FILE")
    out.add_argument("--chart", type=Path, metavar="FILE.svg")
    arguments = parser.parse_args(words)
    asked = (arguments.scaling, arguments.tensors, arguments.compile, arguments.mean)
    arguments.speed |= all(one is None for one in asked) and not arguments.memory
    if arguments.chart and not arguments.speed:
        parser.error("--chart draws what --speed measures: give that one, too")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here")
    if arguments.device == "cuda" and (arguments.compile is not None or arguments.memory):
        parser.error("--compile and --memory measure on the CPU only")
    return arguments


def chosen(arguments: argparse.Namespace, default: list[str]) -> list[Contender]:
    return [BY_KEY[key] for key in arguments.only or default]


def plan_of(arguments: argparse.Namespace) -> Plan:
    return Plan(arguments.warmup, arguments.rounds, seconds=arguments.seconds)


def measure_speed(arguments: argparse.Namespace) -> Result:
    """Every optimizer on the whole LoRA."""
    on_gpu = arguments.device == "cuda"
    keys = [contender.key for contender in CONTENDERS if contender.on_gpu or not on_gpu]
    contenders = chosen(arguments, keys)
    shapes = sdxl_lora(arguments.modules)
    parameters = size_of(shapes)
    print(f"{len(shapes)} tensors, {parameters / 1e6:.1f} M parameters, float32\n")
    head = ["optimizer", "ms", "× fused AdamW", "quartiles", "state B/param", "held B/param"]
    print_head([*head, *(["kernels", "copies"] if on_gpu else [])])
    results = []
    for result in compare_all(contenders, shapes, arguments):
        results.append(result)
        row = [f"{result['label']} {result['version']}".strip()]
        if result["obstacle"]:
            row += [result["obstacle"], *[""] * 4]
        else:
            row += [f"{result['ms']['median']:.1f}", *ratio_cells(result)]
            row += [f"{result['state_bytes']:.2f}", f"{result['held_bytes']:.2f}"]
        if on_gpu:
            row += [str(result.get("kernels", "")), str(result.get("copies", ""))]
        print_row(row)
    print()
    return {
        "workload": {"tensors": len(shapes), "parameters": parameters, "dtype": "float32"},
        "optimizers": results,
    }


def compare_all(
    contenders: list[Contender], shapes: Shapes, arguments: argparse.Namespace
) -> Iterator[Result]:
    """The figures of each one that can run; of the others, why not."""
    workload = Workload(shapes, arguments.device)
    plan = plan_of(arguments)
    reference = warm_reference(workload, plan)
    for contender in contenders:
        obstacle = contender.obstacle()
        result = {
            "key": contender.key,
            "label": contender.label,
            "ours": contender.ours,
            "version": "" if obstacle else contender.version,
            "obstacle": obstacle,
        }
        if obstacle is None:
            print(f"measuring {contender.label}", file=sys.stderr, flush=True)
            result |= compare(contender, reference, workload, plan).as_dict()
        yield result


def measure_scaling(arguments: argparse.Namespace) -> list[Result]:
    """Steps on LoRAs of several sizes, and how far each lies from a straight line."""
    sizes = arguments.scaling or [1, 4, 16, 57, 200]
    contenders = chosen(arguments, ["hina"])
    by_size = []
    for size in sizes:
        shapes = sdxl_lora_of_size(1e6 * size)
        by_size.append((size_of(shapes), list(compare_all(contenders, shapes, arguments))))
    counts = [count for count, _ in by_size]
    scaling = []
    for results in zip(*(results for _, results in by_size), strict=True):
        if results[0]["obstacle"]:
            continue
        times = [result["ms"]["median"] for result in results]
        a, b, residuals = fit_line(counts, times)
        largest = max(map(abs, residuals))
        print(f"{results[0]['label']}: ms = {a:.3f} + {1e6 * b:.4f} · millions of parameters")
        print(f"largest relative residual {largest:.1%}\n")
        rows = [
            [f"{n / 1e6:.2f}", f"{ms:.2f}", f"{residual:+.1%}", *ratio_cells(result)]
            for n, ms, residual, result in zip(counts, times, residuals, results, strict=True)
        ]
        print_table(["M parameters", "ms", "residual", "× fused AdamW", "quartiles"], rows)
        fit = {"a_ms": a, "b_ms_per_million": 1e6 * b, "largest_residual": largest}
        scaling.append(
            {"key": results[0]["key"], **fit, "parameters": counts, "sizes": list(results)}
        )
    return scaling


def fit_line(counts: list[int], times: list[float]) -> tuple[float, float, list[float]]:
    """times = a + b·counts by least squares of the relative residuals, so that the smallest counts
    as much as the largest; a, b, and those residuals."""
    n, t = np.array(counts, dtype=float), np.array(times)
    terms = np.stack([1 / t, n / t], axis=1)
    (a, b), *_ = np.linalg.lstsq(terms, np.ones_like(t), rcond=None)
    return float(a), float(b), [float(residual) for residual in a / t + b * n / t - 1]


def measure_tensors(arguments: argparse.Namespace) -> list[Result]:
    """The same number of parameters in few tensors and in many."""
    counts = arguments.tensors or [200, 20_000]
    total = size_of(sdxl_lora(arguments.modules))
    contenders = chosen(arguments, [REFERENCE.key, "hina", "hina-adamw"])
    by_count = [
        list(compare_all(contenders, lora_in_tensors(count, total), arguments)) for count in counts
    ]
    tensors, rows = [], []
    for results in zip(*by_count, strict=True):
        if results[0]["obstacle"]:
            continue
        times = [result["ms"]["median"] for result in results]
        bytes_ = " / ".join(f"{result['state_bytes']:.2f}" for result in results)
        slowdown = times[-1] / times[0]
        label, key = results[0]["label"], results[0]["key"]
        rows.append([label, *(f"{ms:.1f}" for ms in times), f"{slowdown:.2f}", bytes_])
        tensors.append(
            {"key": key, "tensors": counts, "slowdown": slowdown, "counts": list(results)}
        )
    print(f"{total / 1e6:.1f} M parameters in tensors of one size\n")
    heads = [f"ms in {count} tensors" for count in counts]
    print_table(["optimizer", *heads, "last : first", "state B/param"], rows)
    return tensors


def measure_compiling(arguments: argparse.Namespace) -> list[Result]:
    told, rows = [], []
    for contender in chosen(arguments, ["hina"]):
        cost = compile_cost(contender.key, arguments.modules, arguments.threads, arguments.compile)
        told.append({"key": contender.key, **cost})
        rows.append(
            [
                contender.label,
                f"{cost['first_step_s']:.2f}",
                f"{cost['first_step_s_cached']:.2f}",
                f"{cost['compilations_first_step']} / {cost['compilations']}",
                f"{cost['median_step_ms']:.1f}",
                f"{cost['slowest_later_step_ms']:.1f}",
            ]
        )
    print_table(
        [
            "optimizer",
            "first step, s",
            "with filled cache, s",
            f"compilations in step 1 / in {arguments.compile}",
            "median step, ms",
            "slowest later step, ms",
        ],
        rows,
    )
    return told


def measure_memory(arguments: argparse.Namespace) -> list[Result]:
    told, rows = [], []
    for contender in chosen(arguments, [REFERENCE.key, "hina", "hina-eager"]):
        if contender.obstacle():
            continue
        peak = peak_memory(contender.key, arguments.modules, arguments.threads)
        told.append({"key": contender.key, **peak})
        rows.append(
            [
                contender.label,
                f"{peak['peak_mb']:.0f}",
                f"{peak['peak_of_gradients']:.2f}",
                f"{peak['held_mb']:.0f}",
                f"{peak['held_of_gradients']:.2f}",
            ]
        )
    print_table(
        ["optimizer", "peak in a step, MiB", "÷ gradients", "always held, MiB", "÷ gradients"],
        rows,
    )
    return told


def measure_mean(arguments: argparse.Namespace) -> list[Result]:
    """Steps one by one from the first on, each beside one of the reference; the first one makes
    programs and does not count."""
    told, rows = [], []
    workload = Workload(sdxl_lora(arguments.modules), arguments.device)
    reference = warm_reference(workload, plan_of(arguments))
    for contender in chosen(arguments, ["cameamp8", "cameamp", "improved"]):
        runner = Runner(contender, workload)
        runner.step()
        times, others = [], []
        for _ in range(arguments.mean - 1):
            times.append(runner.step())
            others.append(reference.step())
        mean, other = statistics.mean(times), statistics.mean(others)
        told.append(
            {"key": contender.key, "mean_ms": mean, "ratio": mean / other, "worst_ms": max(times)}
        )
        rows.append([contender.label, f"{mean:.1f}", f"{mean / other:.2f}", f"{max(times):.0f}"])
    print_table(["optimizer", "mean step, ms", "× fused AdamW's", "worst, ms"], rows)
    return told


def ratio_cells(result: Result) -> list[str]:
    ratio = result["ratio"]
    return [f"{ratio['median']:.2f}", f"{ratio['low']:.2f} – {ratio['high']:.2f}"]


def print_table(head: list[str], rows: list[list[str]]) -> None:
    print_head(head)
    for row in rows:
        print_row(row)
    print()


def print_head(head: list[str]) -> None:
    """Of a Markdown table; all columns but the first are of figures, so to the right."""
    print_row(head)
    print(f"|---|{'---:|' * (len(head) - 1)}", flush=True)


def print_row(row: list[str]) -> None:
    print(f"| {' | '.join(row)} |", flush=True)


def draw(told: Result) -> str:
    """The chart of the optimizers that were measured."""
    workload = told["workload"]
    title = (
        f"One optimizer step on SDXL's LoRA ({workload['tensors']} tensors, "
        f"{workload['parameters'] / 1e6:.0f} M parameters) relative to fused AdamW"
    )
    bars = [
        Bar(result["label"], result["ratio"]["median"], result["state_bytes"], result["ours"])
        for result in told["optimizers"]
        if result["obstacle"] is None
    ]
    return bar_chart(title, "fused AdamW", bars)


if __name__ == "__main__":
    sys.exit(main())
