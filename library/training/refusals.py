"""The options that stock has and this trainer refuses, each with the reason.

They parse like the others. A run stops before anything is loaded as soon as one of them is set to
something other than its default (`run_checks.refused_options`).
"""

from __future__ import annotations

_DEEPSPEED = (
    "DeepSpeed is not supported. An adapter's optimizer state is small, so splitting it over "
    "processes gains little; `accelerate launch` with several processes works without it"
)
_FP8 = "8-bit base weights are not built yet. --mixed_precision bf16 halves the base model's size"
_COMPILE = "compiling the base model is not built yet"
_HUB = (
    "uploading is not built yet. The files are in --output_dir when the run ends; "
    "`hf upload` takes them from there"
)

REFUSED: dict[str, str] = {
    "deepspeed": _DEEPSPEED,
    "zero_stage": _DEEPSPEED,
    "offload_optimizer_device": _DEEPSPEED,
    "offload_optimizer_nvme_path": _DEEPSPEED,
    "offload_param_device": _DEEPSPEED,
    "offload_param_nvme_path": _DEEPSPEED,
    "zero3_init_flag": _DEEPSPEED,
    "zero3_save_16bit_model": _DEEPSPEED,
    "fp16_master_weights_and_gradients": _DEEPSPEED,
    "fp8_base": _FP8,
    "fp8_base_unet": _FP8,
    "torch_compile": _COMPILE,
    "dynamo_backend": _COMPILE,
    "huggingface_repo_id": _HUB,
    "huggingface_repo_type": _HUB,
    "huggingface_path_in_repo": _HUB,
    "huggingface_token": _HUB,
    "huggingface_repo_visibility": _HUB,
    "save_state_to_huggingface": _HUB,
    "async_upload": _HUB,
    "resume_from_huggingface": (
        "resuming from the Hub is not built yet. Download the state's folder (`hf download`) and "
        "give it to --resume"
    ),
    "dataset_class": (
        "dataset classes of your own are not built yet. Describe the data with --dataset_config"
    ),
    "fused_backward_pass": (
        "stepping inside the backward pass saves memory where the whole model is trained; an "
        "adapter's gradients are too small for it to matter"
    ),
    "cpu_offload_checkpointing": (
        "the UNets of Stable Diffusion cannot move checkpoints to main memory. "
        "--gradient_checkpointing alone works"
    ),
}
