"""Stock's script of this name in miniature: its options, its class, its call of get_optimizer."""

import argparse
import importlib
import logging

import torch

from library import train_util


class NetworkTrainer:
    def train(self, args):
        torch.manual_seed(args.seed)
        module = importlib.import_module(args.network_module)
        network = module.create_network(**dict(a.split("=") for a in args.network_args or ()))

        try:
            results = network.prepare_optimizer_params(
                args.text_encoder_lr, args.unet_lr, args.learning_rate
            )
            trainable_params = results[0] if type(results) is tuple else results
        except TypeError:
            trainable_params = network.prepare_optimizer_params(args.text_encoder_lr, args.unet_lr)

        optimizer_name, optimizer_args, optimizer = train_util.get_optimizer(args, trainable_params)

        lr_scheduler = train_util.get_scheduler_fix(args, optimizer, 1)
        x, wanted = torch.randn(32, 24), torch.randn(32, 16)
        for _ in range(args.max_train_steps):
            loss = (network(x) - wanted).square().mean()
            loss.backward()
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad(set_to_none=True)
        self.network, self.optimizer = network, optimizer
        self.described = (optimizer_name, optimizer_args, loss.item())


def setup_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    for option in ("learning_rate", "unet_lr", "text_encoder_lr"):
        parser.add_argument(f"--{option}", type=float, default=None)
    for option in ("optimizer_type", "network_module"):
        parser.add_argument(f"--{option}", default="")
    for option in ("optimizer_args", "network_args"):
        parser.add_argument(f"--{option}", nargs="*", default=None)
    for option in ("use_8bit_adam", "use_lion_optimizer", "fused_backward_pass"):
        parser.add_argument(f"--{option}", action="store_true")
    parser.add_argument("--max_train_steps", type=int, default=12)
    parser.add_argument("--seed", type=int, default=7)
    return parser


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    trainer = NetworkTrainer()
    trainer.train(setup_parser().parse_args())
    print("trained with", *trainer.described)
