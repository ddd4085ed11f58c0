"""What stock's file of this name is to its scripts: the place where optimizers are made."""

import ast
import importlib
import logging

import torch

logger = logging.getLogger(__name__)


def get_optimizer(args, trainable_params) -> tuple[str, str, object]:
    """Stock's way: 8-bit names are bitsandbytes', undotted ones torch's, values are literals."""
    kind = (args.optimizer_type or "AdamW").lower()
    kwargs = {}
    for argument in args.optimizer_args or ():
        key, value = argument.split("=")
        kwargs[key] = ast.literal_eval(value)
    if kind.endswith("8bit"):
        raise ImportError("No bitsandbytes")
    module, _, name = (args.optimizer_type or "AdamW").rpartition(".")
    cls = getattr(importlib.import_module(module or "torch.optim"), name)
    optimizer = cls(trainable_params, lr=args.learning_rate, **kwargs)
    logger.info("use %s | %s", name, kwargs)
    arguments = ",".join(f"{key}={value}" for key, value in kwargs.items())
    return f"{cls.__module__}.{cls.__name__}", arguments, optimizer


def get_scheduler_fix(args, optimizer, num_processes: int):
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
