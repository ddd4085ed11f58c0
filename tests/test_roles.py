"""Names to roles and pairs, on every adapter format's own names."""

import warnings

import lycoris.kohya
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from library.custom_hina_adamw_optimizer import HinaAdamWOptimizer
from library.optim.roles import Roles, group_names, parse_name

UNET = "lora_unet_down_blocks_0_attentions_0_to_q"


@pytest.mark.parametrize(
    ("name", "role", "slot", "base"),
    [
        (f"{UNET}.lora_down.weight", "lora_a", "lora_a", UNET),
        (f"{UNET}.lora_up.weight", "lora_b", "lora_b", UNET),
        (f"{UNET}.lora_mid.weight", "lora_mid", "lora_mid", UNET),
        ("m.attn.lora_A.default.weight", "lora_a", "lora_a", "m.attn"),
        ("m.attn.lora_B.default.weight", "lora_b", "lora_b", "m.attn"),
        ("m.emb.lora_embedding_A.default", "lora_a", "lora_a", "m.emb"),
        ("m.emb.lora_embedding_B.default", "lora_b", "lora_b", "m.emb"),
        ("m.processor.to_q_lora.down.weight", "lora_a", "lora_a", "m.processor.to_q"),
        ("m.to_q.lora.up.weight", "lora_b", "lora_b", "m.to_q"),
        (f"{UNET}.lokr_w1", "lokr_w1", "lokr_w1", UNET),
        (f"{UNET}.lokr_w1_a", "lokr_w1", "lokr_w1_a", UNET),
        (f"{UNET}.lokr_w2_b", "lokr_w2", "lokr_w2_b", UNET),
        (f"{UNET}.lokr_t2", "lokr_w2", "lokr_w2_t", UNET),
        (f"{UNET}.lokr.w2", "lokr_w2", "lokr_w2", UNET),
        (f"{UNET}.lokr_t1", "lokr_generic", "lokr_generic", UNET),
        (
            "unet.down_blocks.0.attentions.0.lokr_w1.weight",
            "lokr_w1",
            "lokr_w1",
            "unet.down_blocks.0.attentions.0",
        ),
        ("x.LoKr_W2_A", "lokr_w2", "lokr_w2_a", "x"),
        ("x.w_norm", "w_norm", "w_norm", "x"),
        ("x.b_norm", "b_norm", "b_norm", "x"),
        ("x.hada_w1_a", "hada", "hada", "x"),
        ("x.hada_t2", "hada", "hada", "x"),
        ("x.dora_scale", "dora_scale", "dora_scale", "x"),
        ("x.lora_magnitude_vector.default.weight", "dora_scale", "dora_scale", "x"),
        ("x.oft_blocks", "oft_blocks", "oft_blocks", "x"),
        ("x.ia3_l.default", "ia3", "ia3", "x"),
        ("x.a1.weight", "glora", "glora", "x"),
        # Words of a path that look like a factor's.
        ("lora_down_blocks_0.lora_up.weight", "lora_b", "lora_b", "lora_down_blocks_0"),
        ("lora_attn_1.lora_up.weight", "lora_b", "lora_b", "lora_attn_1"),
        ("lokr_unet_x.lokr_w2", "lokr_w2", "lokr_w2", "lokr_unet_x"),
        ("blocks.0.kw_norm.weight", "regular", "regular", "blocks.0.kw_norm.weight"),
        ("blocks.0.norm.weight", "regular", "regular", "blocks.0.norm.weight"),
        ("", "regular", "regular", ""),
    ],
)
def test_names(name, role, slot, base):
    parsed = parse_name(name)
    assert (parsed.role, parsed.slot, parsed.base) == (role, slot, base)


def test_adapters_of_peft_stay_apart():
    names = [f"m.lora_{half}.{adapter}.weight" for half in "AB" for adapter in ("one", "two")]
    params = [torch.randn(2, 8), torch.randn(2, 8), torch.randn(9, 2), torch.randn(9, 2)]
    roles = Roles([{"params": params, "param_names": names}])
    assert [
        (pair.a is params[i], pair.b is params[i + 2]) for i, pair in enumerate(roles.lora_pairs)
    ] == [
        (True, True),
        (True, True),
    ]


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


def test_pairs_join_across_groups():
    down, up = parameter(2, 8), parameter(9, 2)
    w1, w2a, w2b = parameter(3, 3), parameter(4, 2), parameter(2, 5)
    optimizer = HinaAdamWOptimizer(
        [
            {"params": [down, w2b], "named": ["x.lora_down.weight", "y.lokr_w2_b"]},
            {"params": [up], "named": ["x.lora_up.weight"], "lr": 1e-2},
            {"params": [w1, w2a], "named": ["y.lokr_w1", "y.lokr_w2_a"]},
        ]
    )
    assert optimizer.roles.lora_pairs[0].a is down
    assert optimizer.roles.lora_pairs[0].b is up
    (pair,) = optimizer.roles.lokr_pairs
    assert set(map(id, pair.members)) == {id(w1), id(w2a), id(w2b)}
    assert pair.w2.zero_initialised is w2b


def test_first_way_of_naming_wins():
    p = parameter(3)
    p.param_name = "from.attribute"
    group = {"params": [p]}
    assert group_names(group) == ["from.attribute"]
    group["named"] = ["from.named"]
    assert group_names(group) == ["from.named"]
    group["param_names"] = ["from.param_names"]
    assert group_names(group) == ["from.param_names"]


@pytest.mark.parametrize("key", ["named", "param_names"])
def test_another_number_of_names_is_an_error(key):
    with pytest.raises(ValueError, match="2 parameters but 1 names"):
        HinaAdamWOptimizer([{"params": [parameter(3), parameter(4)], key: ["x"]}])


def test_one_warning_without_names_and_none_with():
    with pytest.warns(UserWarning, match="no parameter names") as caught:
        optimizer = HinaAdamWOptimizer([{"params": [parameter(3)]}, {"params": [parameter(4)]}])
    assert len(caught) == 1
    assert set(optimizer.roles.role.values()) == {"regular"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HinaAdamWOptimizer([("x.lora_down.weight", parameter(3, 3))])


def test_named_and_unnamed_groups_go_together():
    first, second = parameter(3), parameter(4)
    optimizer = HinaAdamWOptimizer(
        [{"params": [first]}, {"params": [second], "named": ["x.w_norm"]}]
    )
    assert optimizer.roles.role[first] == "regular"
    assert optimizer.roles.role[second] == "w_norm"


def test_unpaired_halves_are_listed():
    optimizer = HinaAdamWOptimizer(
        [
            ("x.lora_down.weight", parameter(2, 8)),
            ("y.lora_down.weight", parameter(3, 8)),
            ("y.lora_up.weight", parameter(9, 2)),
            ("z.lokr_w1", parameter(3, 3)),
            ("z.lokr_w2_a", parameter(3, 3)),
            ("n.b_norm", parameter(3)),
        ]
    )
    diagnosis = optimizer.diagnose_lora_pairing()
    assert diagnosis["lora_pairs"] == diagnosis["lokr_pairs"] == diagnosis["norm_pairs"] == 0
    found = {(item["name"], item["shape"]): item["reason"] for item in diagnosis["unpaired"]}
    assert found["x.lora_down.weight", (2, 8)] == "no lora_b of the same base name"
    assert found["y.lora_up.weight", (9, 2)] == "the shapes of lora_a and lora_b do not multiply"
    assert found["z.lokr_w1", (3, 3)] == "no complete lokr_w2 of the same base name"
    assert found["n.b_norm", (3,)] == "no w_norm of the same base name"
    assert optimizer.get_optimization_info()["lokr_stats"]["lokr_groups"] == 1


def test_the_same_name_in_two_networks_pairs_each_with_its_own():
    a, b = [parameter(2, 8), parameter(2, 8)], [parameter(9, 2), parameter(9, 2)]
    names = ["x.lora_down.weight", "x.lora_up.weight"]
    groups = [{"params": [a[i], b[i]], "named": names} for i in (0, 1)]
    pairs = HinaAdamWOptimizer(groups).roles.lora_pairs
    assert [(pair.a is a[i], pair.b is b[i]) for i, pair in enumerate(pairs)] == [(True, True)] * 2


class Attention(nn.Module):
    """Named as in diffusers, so that LyCORIS's presets find it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.to_q = nn.Linear(64, 96)
        self.conv = nn.Conv2d(32, 48, 3)
        self.proj_in = nn.Conv2d(32, 48, 1)


class Transformer2DModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Attention(), Attention()])


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = Transformer2DModel()


def lycoris_network(dim: int = 2, **options: str) -> nn.Module:
    unet = UNet()
    network = lycoris.kohya.create_network(
        1.0, dim, 1.0, None, [], unet, preset="full", conv_dim=str(dim), conv_alpha="1", **options
    )
    network.apply_to([], unet, False, True)
    return network


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"decompose_both": "True"},
        {"full_matrix": "True"},
        {"use_tucker": "True", "decompose_both": "True"},
        {"factor": "4", "dora_wd": "True"},
    ],
)
def test_all_lokr_pairs_of_a_lycoris_network_are_found(options):
    network = lycoris_network(algo="lokr", train_norm="True", **options)
    optimizer = HinaAdamWOptimizer(network.named_parameters())
    adapted = [module for module in network.unet_loras if type(module).__name__ == "LokrModule"]
    stats = optimizer.get_optimization_info()["lokr_stats"]
    assert len(adapted) == 6
    assert stats["lokr_pairs"] == stats["lokr_groups"] == len(adapted)
    assert stats["norm_pairs"] == stats["w_norm_params"] == stats["b_norm_params"] == 2
    assert optimizer.diagnose_lora_pairing()["unpaired"] == []
    in_pairs = {id(p) for pair in optimizer.roles.lokr_pairs for p in pair.members}
    assert in_pairs == {id(p) for name, p in network.named_parameters() if "lokr_" in name}
    for pair in optimizer.roles.lokr_pairs:  # the half that LyCORIS starts at zero
        assert (pair.w2.zero_initialised == 0).all()


@pytest.mark.parametrize("options", [{}, {"use_tucker": "True"}, {"dora_wd": "True"}])
def test_all_lora_pairs_of_a_lycoris_network_are_found(options):
    network = lycoris_network(algo="locon", **options)
    roles = HinaAdamWOptimizer(network.named_parameters()).roles
    assert len(roles.lora_pairs) == roles.count("lora_a") == roles.count("lora_b") == 6
    assert roles.unpaired == []


@pytest.mark.parametrize(
    ("algo", "role"),
    [("loha", "hada"), ("diag-oft", "oft_blocks"), ("glora", "glora")],
)
def test_other_lycoris_algorithms_have_their_own_role(algo, role):
    network = lycoris_network(algo=algo, dim=4)
    roles = HinaAdamWOptimizer(network.named_parameters()).roles
    assert roles.count(role) > 0
    assert roles.count("lora_a") == roles.count("lokr_w1") == 0


def test_all_lora_pairs_of_a_peft_model_are_found():
    model = get_peft_model(
        nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 4)),
        LoraConfig(r=2, target_modules=["0", "1", "2"], use_dora=False),
    )
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    roles = HinaAdamWOptimizer(trained).roles
    assert len(roles.lora_pairs) == 3
    assert roles.unpaired == []
