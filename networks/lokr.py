"""`--network_module networks.lokr`: LoKr (arXiv 2309.14859) on the layers of stock's LoRA."""

from __future__ import annotations

from functools import partial

from networks import build

create_network = partial(build.create_network, "networks.lokr")
create_network_from_weights = partial(build.create_network_from_weights, "networks.lokr")
