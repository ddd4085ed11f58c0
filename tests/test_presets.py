"""networks/presets.py: which layers a preset reaches."""

from __future__ import annotations

from typing import Any

from networks.presets import Selection, Targets, preset_selection


class TestNames:
    """LyCORIS's rule, from the start of the path; names of targets also mean the end of one."""

    def reached(self, path: str, wildcards: bool = False, **keys: Any) -> Any:
        targets = Targets(frozenset({"Block"}), keys.pop("targets", ()))
        selection = Selection(targets, targets, wildcards=wildcards, **keys)
        return selection.config(targets, path, ["Block", "Conv2d"])

    def test_excluded(self) -> None:
        conv = "down_blocks.0.resnets.0.conv1"
        assert self.reached(conv, excluded=("conv1",)) == {}
        for pattern in (conv, ".*conv1", "down_blocks"):
            assert self.reached(conv, excluded=(pattern,)) is None
        assert self.reached(conv, excluded=("down_blocks",), wildcards=True) == {}
        assert self.reached(conv, excluded=("*.conv1",), wildcards=True) is None

    def test_targets(self) -> None:
        targets = Targets(frozenset(), ("to_k", "conv_in", "mid.*"))
        selection = Selection(targets, targets)
        reached = {
            path: selection.config(targets, path, []) is not None
            for path in ("a.to_k", "conv_in", "mid_block.x", "a.to_kk", "a.mid_block")
        }
        assert list(reached.values()) == [True, True, True, False, False]

    def test_settings_by_name(self) -> None:
        by_name = {"a.*": {"dim": 1}, "a.conv": {"dim": 2}, "conv": {"dim": 3}}
        keys: dict[str, Any] = {"by_name": by_name, "targets": ("conv", "to_k")}
        assert self.reached("a.conv", **keys) == {"dim": 2}  # the whole path before a pattern
        assert self.reached("a.b.conv", **keys) == {"dim": 1}
        assert self.reached("b.conv", **keys) == {}

    def test_ia3s_own_preset_means_ends_of_paths(self) -> None:
        selection = preset_selection("ia3")
        config = selection.config(selection.unet, "mid_block.ff.net.2", [])
        assert config == {"train_on_input": True}
        assert selection.config(selection.unet, "mid_block.attn1.to_k", []) == {}
