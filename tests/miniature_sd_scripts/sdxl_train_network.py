"""The same for SDXL: as in stock, a class derived from the other script's."""

import train_network


class SdxlNetworkTrainer(train_network.NetworkTrainer):
    pass
