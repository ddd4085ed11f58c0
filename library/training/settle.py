"""What options mean together: aliases, values that imply others, paths as they were meant."""

from __future__ import annotations

from typing import Any

from library.training.options import OPTIONS, Options
from library.training.paths import clean_path


def settle(options: Options) -> Options:
    """A copy in which every option holds what the run goes by; settling twice changes nothing.

    Contradictions stay as they are, for `option_checks` to find.
    """
    settled = options.changed(_without_blanks(options))
    changes: dict[str, Any] = {}
    notes = list(settled.notes)
    if settled.caption_extention is not None:
        changes |= {"caption_extension": settled.caption_extention, "caption_extention": None}
    if settled.cache_latents_to_disk:
        changes["cache_latents"] = True
    if settled.cache_text_encoder_outputs_to_disk:
        changes["cache_text_encoder_outputs"] = True
    if not settled.optimizer_type and settled.use_8bit_adam != settled.use_lion_optimizer:
        changes["optimizer_type"] = "AdamW8bit" if settled.use_8bit_adam else "Lion"
        changes |= {"use_8bit_adam": False, "use_lion_optimizer": False}
    elif not settled.optimizer_type and not settled.use_8bit_adam:
        changes["optimizer_type"] = "AdamW"
    for name in ("sample_every_n_steps", "sample_every_n_epochs"):
        value = getattr(settled, name)
        if value is not None and value <= 0:
            changes[name] = None
            notes.append(f"--{name} {value}: no pictures are drawn at such intervals.")
    if settled.persistent_data_loader_workers and settled.max_data_loader_n_workers == 0:
        changes["persistent_data_loader_workers"] = False
        notes.append("--persistent_data_loader_workers: there are none to keep, as asked for.")
    if settled.adaptive_noise_scale == 0:
        changes["adaptive_noise_scale"] = None
    settled = settled.changed(changes)
    settled.notes = tuple(dict.fromkeys(notes))
    return settled


def _without_blanks(options: Options) -> dict[str, Any]:
    """Paths as they were meant, and None for text that is empty where nothing is the default."""
    changes: dict[str, Any] = {}
    for option in OPTIONS.values():
        value = getattr(options, option.name)
        if option.path and isinstance(value, list):
            changes[option.name] = [path for path in map(clean_path, value) if path]
        elif option.path and value is not None:
            changes[option.name] = clean_path(value)
        elif value == "" and option.default is None:
            changes[option.name] = None
    return changes
