"""Options about what a run leaves behind: files, metadata, logs."""

from __future__ import annotations

from dataclasses import dataclass

from library.training.options.fields import option


@dataclass
class SavingOptions:
    """Saving."""

    output_dir: str | None = option(None, "folder that everything is written to", path=True)
    output_name: str | None = option(
        None, "file name of the adapter, without its ending; last without this option"
    )
    save_model_as: str = option(
        "safetensors", "file format", choices=(None, "ckpt", "pt", "safetensors")
    )
    save_precision: str | None = option(
        None,
        "precision of the file; as trained without it",
        choices=(None, "float", "fp16", "bf16"),
    )
    save_every_n_steps: int | None = option(None, "save after every n-th step", low=1)
    save_every_n_epochs: int | None = option(None, "save after every n-th epoch", low=1)
    save_n_epoch_ratio: int | None = option(
        None, "save so many times over the run; stronger than --save_every_n_epochs", low=0
    )
    save_last_n_steps: int | None = option(
        None, "remove files once they are more than n steps old", low=1
    )
    save_last_n_epochs: int | None = option(
        None, "keep the files of the last n saves made by epoch", low=1
    )
    save_state: bool = option(False, "save the state too, to --resume from, at every save")
    save_state_on_train_end: bool = option(False, "save the state at the end")
    save_last_n_steps_state: int | None = option(
        None, "the same as --save_last_n_steps, for states; the same number without it", low=1
    )
    save_last_n_epochs_state: int | None = option(
        None, "the same as --save_last_n_epochs, for states; the same number without it", low=1
    )


@dataclass
class MetadataOptions:
    """Metadata in the adapter file."""

    no_metadata: bool = option(False, "write only what is needed to load the file")
    training_comment: str | None = option(None, "a note of your own")
    metadata_title: str | None = option(None, "title; --output_name without this option")
    metadata_author: str | None = option(None, "who made it")
    metadata_description: str | None = option(None, "what the adapter does")
    metadata_license: str | None = option(None, "licence it may be used under")
    metadata_tags: str | None = option(None, "tags, separated by commas")
    metadata_usage_hint: str | None = option(None, "how to use the adapter")
    metadata_thumbnail: str | None = option(None, "picture: a file or a data: URL")
    metadata_merged_from: str | None = option(None, "models it was merged from")
    metadata_trigger_phrase: str | None = option(None, "words that call up what was learned")
    metadata_preprocessor: str | None = option(None, "how the pictures were prepared")
    metadata_is_negative_embedding: str | None = option(None, "true for a negative embedding")


@dataclass
class LoggingOptions:
    """Logging."""

    logging_dir: str | None = option(
        None, "folder for the trackers' files; turns TensorBoard on", path=True
    )
    log_with: str | None = option(None, "trackers", choices=("tensorboard", "wandb", "all"))
    log_prefix: str | None = option(None, "text before the time in the name of the log folder")
    log_tracker_name: str | None = option(None, "project name; network_train without it")
    log_tracker_config: str | None = option(
        None, "TOML file with arguments for each tracker's start", path=True
    )
    log_config: bool = option(False, "log the options too (without paths and keys)")
    wandb_run_name: str | None = option(None, "name of the run on W&B")
    wandb_api_key: str | None = option(None, "key to log in to W&B with")
    console_log_level: str | None = option(
        None,
        "least important messages to show; INFO without it",
        choices=("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"),
    )
    console_log_file: str | None = option(
        None, "write messages to this file instead of the console", path=True
    )
    console_log_simple: bool = option(False, "messages without time and place")


@dataclass
class HubOptions:
    """Hugging Face Hub."""

    huggingface_repo_id: str | None = option(None, "repository to upload to")
    huggingface_repo_type: str | None = option(None, "model, dataset or space")
    huggingface_path_in_repo: str | None = option(None, "folder in that repository")
    huggingface_token: str | None = option(None, "access token for the Hub")
    huggingface_repo_visibility: str | None = option(None, "public or private")
    save_state_to_huggingface: bool = option(False, "upload states too")
    resume_from_huggingface: bool = option(False, "take --resume from a repository")
    async_upload: bool = option(False, "upload while training goes on")


@dataclass
class ConfigOptions:
    """Config file."""

    config_file: str | None = option(
        None, "TOML file with options; the command line is stronger than the file", path=True
    )
    output_config: bool = option(False, "write the options given here to --config_file, then stop")
