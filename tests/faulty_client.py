"""A client of a federated run that fails in the way that `$FAULT` says, as `round:fault` words:
nan, shape, few, slow, kill."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lora.federated import __main__ as command
from lora.federated import client

FAULTS = dict(word.split(":") for word in os.environ["FAULT"].split())


class Faulty(client.FederatedClient):
    def fit(self, parameters: Any, config: Any) -> Any:
        arrays, count, metrics = super().fit(parameters, config)
        match FAULTS.get(str(config["round"])):
            case "nan":
                arrays[1][0, 0] = float("nan")
            case "shape":
                arrays[0] = arrays[0][:, :-1]
            case "few":
                arrays = arrays[:-1]
            case "slow":
                time.sleep(120)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
        return arrays, count, metrics


client.FederatedClient = Faulty  # type: ignore[misc]

if __name__ == "__main__":
    sys.exit(command.main())
