"""Options about how the run goes: its length, its speed, and how it is watched."""

from __future__ import annotations

from dataclasses import dataclass

from library.training.options.fields import option


@dataclass
class RunOptions:
    """Length and batches."""

    max_train_steps: int = option(1600, "number of optimizer steps", low=1)
    max_train_epochs: int | None = option(
        None, "number of passes over the data; stronger than --max_train_steps", low=1
    )
    train_batch_size: int = option(1, "pictures a step and process", low=1)
    gradient_accumulation_steps: int = option(1, "batches added up to one step", low=1)
    seed: int | None = option(
        None, "seed of all randomness; without it, one is drawn and logged", low=0, high=2**63 - 1
    )
    max_data_loader_n_workers: int = option(
        8, "processes that read pictures; 0 reads in the main one", low=0
    )
    persistent_data_loader_workers: bool = option(False, "keep those processes between epochs")
    initial_epoch: int | None = option(None, "count epochs from this one; 1 is the first", low=1)
    initial_step: int | None = option(
        None, "count steps from this one; stronger than --initial_epoch", low=0
    )
    skip_until_initial_step: bool = option(
        False, "pass over the batches before the initial step or epoch instead of only counting on"
    )
    resume: str | None = option(
        None, "go on from this state (a folder written by --save_state)", path=True
    )


@dataclass
class SpeedOptions:
    """Precision, memory and speed."""

    mixed_precision: str = option(
        "no", "precision of the computation", choices=("no", "fp16", "bf16")
    )
    full_fp16: bool = option(False, "adapter and gradients in fp16 too (--mixed_precision fp16)")
    full_bf16: bool = option(False, "adapter and gradients in bf16 too (--mixed_precision bf16)")
    gradient_checkpointing: bool = option(
        False, "compute activations twice instead of keeping them: less memory, slower"
    )
    cpu_offload_checkpointing: bool = option(False, "keep checkpointed activations in main memory")
    sdpa: bool = option(False, "attention by PyTorch's scaled_dot_product_attention (always used)")
    xformers: bool = option(False, "accepted, as --sdpa covers what xFormers did")
    mem_eff_attn: bool = option(False, "accepted, as --sdpa saves the same memory")
    lowram: bool = option(
        False, "accepted; models are read in the precision they are used in anyway"
    )
    highvram: bool = option(False, "accepted; GPU memory is not cleared between steps anyway")
    fp8_base: bool = option(False, "keep the base model in 8-bit floats")
    fp8_base_unet: bool = option(False, "keep the UNet in 8-bit floats, the text encoder not")
    torch_compile: bool = option(False, "compile the models with torch.compile")
    dynamo_backend: str = option(
        "inductor",
        "backend of --torch_compile",
        choices=(
            "eager",
            "aot_eager",
            "inductor",
            "aot_ts_nvfuser",
            "nvprims_nvfuser",
            "cudagraphs",
            "ofi",
            "fx2trt",
            "onnxrt",
            "tensort",
            "ipex",
            "tvm",
        ),
        explain={"no": "that is what you get without --torch_compile: leave it out"},
    )
    ddp_timeout: int | None = option(
        None, "minutes after which processes give up waiting for each other", low=0
    )
    ddp_gradient_as_bucket_view: bool = option(
        False, "with several processes, save the copy of the gradients that is exchanged"
    )
    ddp_static_graph: bool = option(
        False, "with several processes, take it that every step uses the same parameters"
    )


@dataclass
class DeepSpeedOptions:
    """DeepSpeed."""

    deepspeed: bool = option(False, "train under DeepSpeed")
    zero_stage: int = option(2, "ZeRO stage", choices=(0, 1, 2, 3))
    offload_optimizer_device: str | None = option(
        None, "where the optimizer's state lies", choices=(None, "cpu", "nvme")
    )
    offload_optimizer_nvme_path: str | None = option(None, "folder for that state on NVMe")
    offload_param_device: str | None = option(
        None, "where the parameters lie", choices=(None, "cpu", "nvme")
    )
    offload_param_nvme_path: str | None = option(None, "folder for the parameters on NVMe")
    zero3_init_flag: bool = option(False, "build the model split over the processes (stage 3)")
    zero3_save_16bit_model: bool = option(False, "gather the 16-bit weights to save them (stage 3)")
    fp16_master_weights_and_gradients: bool = option(False, "master weights and gradients in fp16")


@dataclass
class SamplingOptions:
    """Sample pictures."""

    sample_prompts: str | None = option(
        None, "file of prompts to draw (.txt, .toml or .json, in the form of sd-scripts)", path=True
    )
    sample_every_n_steps: int | None = option(None, "draw after every n-th step")
    sample_every_n_epochs: int | None = option(
        None, "draw after every n-th epoch; stronger than --sample_every_n_steps"
    )
    sample_at_first: bool = option(False, "draw before the first step too")
    sample_sampler: str = option(
        "ddim",
        "sampler where the prompt names none",
        choices=(
            "ddim",
            "pndm",
            "lms",
            "euler",
            "euler_a",
            "heun",
            "dpm_2",
            "dpm_2_a",
            "dpmsolver",
            "dpmsolver++",
            "dpmsingle",
            "k_lms",
            "k_euler",
            "k_euler_a",
            "k_dpm_2",
            "k_dpm_2_a",
        ),
    )


@dataclass
class ValidationOptions:
    """Validation."""

    validation_split: float = option(
        0.0, "share of the pictures that is kept out of training to measure the loss", low=0, high=1
    )
    validation_seed: int | None = option(
        None, "seed of the split and of its noise; --seed without it", low=0, high=2**63 - 1
    )
    validate_every_n_steps: int | None = option(None, "validate after every n-th step", low=1)
    validate_every_n_epochs: int | None = option(
        None, "validate after every n-th epoch; after each one without either", low=1
    )
    max_validation_steps: int | None = option(None, "use at most so many validation batches", low=1)
