"""`--network_module networks.loha`: LoHa (arXiv 2108.06098) on the layers of stock's LoRA."""

from __future__ import annotations

from functools import partial

from networks import build

create_network = partial(build.create_network, "networks.loha")
create_network_from_weights = partial(build.create_network_from_weights, "networks.loha")
