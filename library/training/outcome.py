"""What a run leaves behind: the report page, and the list of files at the end of the log."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from library.training.loop import Loop
from library.training.options import Options
from library.training.report import peak_memory
from library.training.report_html import Run, write_report
from library.training.sampling import Sample

log = logging.getLogger(__name__)


def leave_report(loop: Loop, adapter_file: Path) -> list[Path]:
    """Write `report.html` and the curves beside the adapter; returns all that the run wrote."""
    options = loop.options
    snapshots = loop.snapshots.written() if loop.snapshots is not None else []
    files = [adapter_file, *_before_and_after(loop.report.samples)]
    if loop.snapshots is not None and snapshots:
        files.insert(1, loop.snapshots.path)
    run = Run(
        name=options.output_name or "last",
        summary=_summary(loop),
        options=options,
        series=loop.report.series,
        samples=loop.report.samples,
        facts=_facts(loop),
        files=files,
        snapshots=snapshots,
    )
    return [*files, *write_report(run, Path(options.output_dir or "."))]


def announce(files: list[Path]) -> None:
    """Name the files a person may want to look at, as the log's last words."""
    log.info("done. What this run wrote:")
    for path in files:
        log.info("  %s", path)


def _before_and_after(samples: Sequence[Sample]) -> list[Path]:
    """The pictures of the first and of the last drawing."""
    steps = {sample.step for sample in (*samples[:1], *samples[-1:])}
    return [sample.path for sample in samples if sample.step in steps]


def _summary(loop: Loop) -> str:
    options: Options = loop.options
    model = Path(options.pretrained_model_name_or_path or "").name
    return (
        f"{options.network_module} on {model}, {loop.progress.step} steps with "
        f"{type(loop.bare_optimizer).__name__}"
    )


def _facts(loop: Loop) -> list[tuple[str, str]]:
    steps = max(loop.progress.step, 1)
    parameters = sum(p.numel() for p in loop.parameters)
    pictures = len(loop.data.records)
    peak, kind = peak_memory()
    return [
        ("Time", f"{loop.report.seconds:.0f} s"),
        ("Per step", f"{loop.report.seconds / steps:.3f} s, samples and saving included"),
        (f"Peak {kind}", f"{peak / 2**20:.0f} MiB"),
        ("Pictures", str(pictures)),
        ("Trained parameters", f"{parameters:,} in {len(loop.parameters)} tensors"),
        ("Steps", f"{loop.progress.step} in {loop.progress.epoch} whole epochs"),
        ("Processes", str(loop.accelerator.num_processes)),
    ]
