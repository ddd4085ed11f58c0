"""Options about the pictures and captions that are trained on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from library.training.options.fields import option


@dataclass
class DatasetOptions:
    """Dataset."""

    dataset_config: str | None = option(
        None, "TOML or JSON file that describes the datasets", parse=Path, path=True
    )
    train_data_dir: str | None = option(
        None, "folder that holds folders of pictures named like 10_cat (repeats, words)", path=True
    )
    reg_data_dir: str | None = option(
        None, "folder of the same form with regularization pictures", path=True
    )
    in_json: str | None = option(
        None, "metadata file in JSON with the captions of --train_data_dir", path=True
    )
    dataset_repeats: int = option(1, "how often an epoch sees each picture of --in_json", low=1)
    resolution: str | None = option(None, "size of the training pictures: 512 or WIDTH,HEIGHT")
    prior_loss_weight: float = option(1.0, "weight of the loss of regularization pictures", low=0)
    masked_loss: bool = option(
        False, "weigh the loss by mask pictures from conditioning_data_dir or by the alpha channel"
    )
    conditioning_data_dir: str | None = option(
        None, "folder of the mask pictures, named like the pictures they belong to", path=True
    )
    alpha_mask: bool = option(False, "use the pictures' alpha channel as mask of the loss")
    skip_broken_images: bool = option(
        False, "leave out pictures that cannot be read, and say how many, instead of stopping"
    )
    cache_info: bool = option(
        False, "keep captions and picture sizes in a file so that the next start is faster"
    )
    debug_dataset: bool = option(False, "show what would be trained on, then stop")
    dataset_class: str | None = option(None, "class of a dataset of your own, package.module.Class")


@dataclass
class PictureOptions:
    """Augmentation and buckets."""

    color_aug: bool = option(False, "vary the colours a little")
    flip_aug: bool = option(False, "mirror pictures left to right, half of the time")
    face_crop_aug_range: str | None = option(
        None, "crop around the face named in the file name; range of the factor, such as 2.0,4.0"
    )
    random_crop: bool = option(False, "crop at a random place instead of the centre")
    resize_interpolation: str | None = option(
        None,
        "filter for resizing; area or lanczos, by direction, without this option",
        choices=("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area"),
    )
    enable_bucket: bool = option(False, "keep each picture's shape: batches of one shape each")
    min_bucket_reso: int = option(256, "shortest side of a bucket in pixels", low=1)
    max_bucket_reso: int = option(1024, "longest side of a bucket in pixels", low=1)
    bucket_reso_steps: int = option(64, "sides of buckets are multiples of this", low=1)
    bucket_no_upscale: bool = option(False, "never enlarge a picture to fill its bucket")


@dataclass
class CacheOptions:
    """Caches."""

    cache_latents: bool = option(
        False,
        "encode each picture once and keep the latents in memory (no colour or crop variation)",
    )
    cache_latents_to_disk: bool = option(
        False, "keep the latents in files, so that the next run has them too"
    )
    vae_batch_size: int = option(1, "pictures encoded at a time", low=1)
    skip_cache_check: bool = option(
        False, "trust cache files that are there instead of checking what they hold"
    )
    cache_text_encoder_outputs: bool = option(
        False, "encode each caption once (needs --network_train_unet_only and fixed captions)"
    )
    cache_text_encoder_outputs_to_disk: bool = option(
        False, "the same; encoded captions stay in memory, no files are written"
    )


@dataclass
class CaptionOptions:
    """Captions."""

    caption_extension: str = option(".caption", "ending of the caption files; .txt is usual")
    caption_extention: str | None = option(None, "the same, as sd-scripts once spelt it")
    caption_separator: str = option(",", "what separates the tags of a caption")
    shuffle_caption: bool = option(False, "put the tags of a caption in another order each time")
    keep_tokens: int = option(0, "this many first tags stay in place and are never dropped", low=0)
    keep_tokens_separator: str = option(
        "", "tags before this separator stay in place, such as |||; stronger than --keep_tokens"
    )
    secondary_separator: str | None = option(
        None, "separator inside a group of tags that stay together, such as ;;;"
    )
    enable_wildcard: bool = option(
        False, "read {a|b|c} in captions as a choice, and take one line of a caption file at random"
    )
    caption_prefix: str | None = option(None, "text put before each caption")
    caption_suffix: str | None = option(None, "text put after each caption")
    caption_dropout_rate: float = option(
        0.0, "probability that a caption is left empty", low=0, high=1
    )
    caption_dropout_every_n_epochs: int = option(
        0, "leave all captions empty in every n-th epoch; 0 for never", low=0
    )
    caption_tag_dropout_rate: float = option(
        0.0, "probability that a tag is left out", low=0, high=1
    )
    token_warmup_min: int = option(1, "number of tags to begin with while they warm up", low=0)
    token_warmup_step: float = option(
        0,
        "all tags are in use from this step on (below 1: share of all steps); 0 for at once",
        low=0,
    )
    weighted_captions: bool = option(False, "read (word:1.3) and [word] in captions as weights")
