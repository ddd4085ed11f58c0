"""`--network_module networks.kohya`: every algorithm and preset of LyCORIS."""

from __future__ import annotations

from functools import partial

from networks import build

create_network = partial(build.create_network, "networks.kohya")
create_network_from_weights = partial(build.create_network_from_weights, "networks.kohya")
