"""Network modules for `--network_module`: adapters of LyCORIS with stock's interface and names.

`networks.lora`, `networks.lokr`, `networks.loha` adapt the layers that stock's LoRA adapts;
`networks.kohya` takes every LyCORIS algorithm and preset.
"""
