"""`--network_module networks.lora`: LoRA on stock's layers, in stock's files."""

from __future__ import annotations

from functools import partial

from networks import build

create_network = partial(build.create_network, "networks.lora")
create_network_from_weights = partial(build.create_network_from_weights, "networks.lora")
