"""Sample pictures: the same as diffusers draws them, and training goes on undisturbed."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from library.training.grids import extend_grid
from library.training.models import load_model
from library.training.options import Options
from library.training.prompts import Prompt
from library.training.samplers import SAMPLERS, make_scheduler
from library.training.sampling import CELLS_AT_ONCE, Sampler, should_sample


def load(folder, kind, **values):
    options = Options(
        pretrained_model_name_or_path=str(folder),
        v2=kind == "sd2",
        v_parameterization=kind == "sd2",
        seed=100,
        **values,
    )
    model = load_model(options, kind == "sdxl", torch.float32, "cpu")
    return model, options


@pytest.fixture(scope="module")
def sd1(tiny_sd1):
    return load(tiny_sd1, "sd1")


def prompt(text, index=0, **values):
    return Prompt(text, index=index, **{"width": 64, "height": 64, "steps": 3, **values})


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def drawn_by_diffusers(model, options, wanted, seed):
    pipeline = model.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    name = wanted.sampler or options.sample_sampler
    pipeline.scheduler = make_scheduler(name, model.scheduler_config, model.prediction_type)
    image = pipeline(
        wanted.text,
        negative_prompt=wanted.negative,
        width=wanted.width,
        height=wanted.height,
        num_inference_steps=wanted.steps,
        guidance_scale=wanted.scale,
        generator=torch.Generator().manual_seed(seed),
    ).images[0]
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_pictures_are_those_of_a_plain_diffusers_call(kind, request, tmp_path):
    model, options = load(request.getfixturevalue(f"tiny_{kind}"), kind)
    prompts = [
        prompt("red cat", 0, seed=3, sampler="euler_a"),
        prompt("icon", 1, negative="red", seed=4, width=96, scale=4.0),
        prompt("cat", 2, scale=1.0),
    ]
    paths = Sampler(model, options, prompts, tmp_path, "run").draw(None, 1)
    for wanted, path, seed in zip(prompts, paths, (3, 4, 102), strict=True):
        expected = drawn_by_diffusers(model, options, wanted, seed)
        assert expected.std() > 10
        assert np.array_equal(pixels(path), expected), wanted.text


@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "dpmsolver++", "lms"])
def test_drawn_together_prompts_give_the_pictures_they_give_alone(sd1, tmp_path, sampler):
    model, options = sd1
    prompts = [
        prompt(text, i, sampler=sampler) for i, text in enumerate(("red cat", "icon", "cat"))
    ]
    together = Sampler(model, options, prompts, tmp_path / "a", "run").draw(None, 1)
    for wanted, path in zip(prompts, together, strict=True):
        expected = drawn_by_diffusers(model, options, wanted, 100 + wanted.index)
        assert np.abs(pixels(path) - expected).max() <= 1  # a float's last bits may round over


def test_batches_hold_what_goes_together_and_fits_memory(sd1, tmp_path):
    model, options = sd1
    long = "red cat " * 50
    prompts = [
        prompt("a", 0),
        prompt("b", 1, steps=5),
        prompt("c", 2),
        prompt(long, 3),
        prompt("d", 4, sampler="euler"),
    ]
    sampler = Sampler(model, options, prompts, tmp_path, "run")
    batches = [[p.index for p, _ in batch] for batch in sampler._batches()]
    assert sorted(batches) == [[0, 2], [1], [3], [4]]
    fit = CELLS_AT_ONCE // (16 * 32)  # cells of 128×256 pixels
    sampler.prompts = [prompt("a", i, width=256, height=128) for i in range(fit + 1)]
    assert [len(batch) for batch in sampler._batches()] == [fit, 1]


def test_training_is_left_as_it_was(sd1, tmp_path):
    model, options = sd1
    model.unet.train()
    model.unet.conv_in.eval()
    before = torch.get_rng_state()
    modes = set()
    hook = model.unet.mid_block.register_forward_hook(
        lambda module, inputs, output: modes.add((module.training, torch.is_grad_enabled()))
    )
    Sampler(model, options, [prompt("cat", sampler="euler_a")], tmp_path, "run").draw(None, 5)
    hook.remove()
    assert modes == {(False, False)}
    assert torch.equal(before, torch.get_rng_state())
    assert model.unet.training
    assert not model.unet.conv_in.training
    assert not model.vae.training
    model.unet.eval()


def test_what_is_applied_to_the_model_takes_part(sd1, tmp_path):
    model, options = sd1
    sampler = Sampler(model, options, [prompt("cat")], tmp_path, "run")
    (before,) = sampler.draw(None, 1)
    hook = model.unet.mid_block.register_forward_hook(lambda module, inputs, output: output + 1)
    (after,) = sampler.draw(None, 2)
    hook.remove()
    assert not np.array_equal(pixels(before), pixels(after))


def test_weights_act_in_prompts(sd1, tmp_path):
    model, options = sd1
    prompts = [prompt("red cat", 0, seed=1), prompt("(red:1.6) cat", 1, seed=1)]
    plain, weighted = Sampler(model, options, prompts, tmp_path, "run").draw(None, 1)
    assert not np.array_equal(pixels(plain), pixels(weighted))


def test_mixed_precision_gives_nearly_the_same_picture(sd1, tmp_path):
    model, options = sd1
    (full,) = Sampler(model, options, [prompt("cat")], tmp_path / "full", "run").draw(None, 1)
    half = options.changed({"mixed_precision": "bf16"})
    (mixed,) = Sampler(model, half, [prompt("cat")], tmp_path / "half", "run").draw(None, 1)
    difference = np.abs(pixels(full) - pixels(mixed)).mean()
    assert 0 < difference < 5


def test_a_float16_vae_that_overflows_is_decoded_in_float32(tiny_sdxl, tmp_path, monkeypatch):
    model, options = load(tiny_sdxl, "sdxl")
    model.vae.half()
    seen = []
    decode = model.vae.decode
    monkeypatch.setattr(model.vae, "decode", lambda x: seen.append(x.dtype) or decode(x))
    Sampler(model, options, [prompt("cat", steps=1)], tmp_path, "run").draw(None, 1)
    assert seen == [torch.float32]
    assert model.vae.dtype == torch.float16


def test_files_have_stocks_names(sd1, tmp_path):
    model, options = sd1
    sampler = Sampler(model, options, [prompt("a", 0, seed=7), prompt("b", 1)], tmp_path, "mine")
    told = []
    sampler.tell = told.extend
    first, second = sampler.draw(None, 20)
    (epoch_end, _) = sampler.draw(2, 40)
    assert first.parent == tmp_path / "sample"
    assert re.fullmatch(r"mine_000020_00_\d{14}_7\.png", first.name)
    assert re.fullmatch(r"mine_000020_01_\d{14}_101\.png", second.name)
    assert re.fullmatch(r"mine_e000002_00_\d{14}_7\.png", epoch_end.name)
    assert [(s.step, s.epoch, s.seed) for s in sampler.history] == [
        (20, None, 7),
        (20, None, 101),
        (40, 2, 7),
        (40, 2, 101),
    ]
    assert told == sampler.history


def test_grids_grow_with_time_and_go_on_after_a_resume(sd1, tmp_path):
    model, options = sd1
    grid = tmp_path / "sample" / "run_prompt00_grid.png"

    def steps():
        with Image.open(grid) as image:
            return json.loads(image.info["steps"]), image.width

    sampler = Sampler(model, options, [prompt("cat", steps=1)], tmp_path, "run")
    widths = []
    for step in (0, 10, 20):
        sampler.draw(None, step)
        widths.append(steps()[1])
    assert steps()[0] == [0, 10, 20]
    assert widths[2] - widths[1] == widths[1] - widths[0] > 0
    resumed = Sampler(model, options, [prompt("cat", steps=1)], tmp_path, "run", start_step=10)
    resumed.draw(None, 20)
    assert steps() == ([0, 10, 20], widths[2])
    Sampler(model, options, [prompt("cat", steps=1)], tmp_path, "run").draw(None, 5)
    assert steps() == ([5], widths[0])


def test_grid_tiles_are_readable_and_keep_earlier_pictures(tmp_path):
    path = tmp_path / "grid.png"
    extend_grid(path, Image.new("RGB", (1024, 512), "red"), 0)
    extend_grid(path, Image.new("RGB", (1024, 512), "blue"), 100)
    grid = pixels(path)
    assert grid.shape[1] == 3 * 8 + 2 * 256
    assert tuple(grid[60, 60]) == (255, 0, 0)
    assert tuple(grid[60, 400]) == (0, 0, 255)
    extend_grid(tmp_path / "small.png", Image.new("RGB", (48, 48)), 0)
    assert pixels(tmp_path / "small.png").shape[1] == 2 * 8 + 144


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_ends_near_the_picture_it_is_led_to(name):
    """A model that always predicts the noise to one picture: each sampler must arrive there."""
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = make_scheduler(name, {**config, "steps_offset": 1}, "epsilon")
    picture = torch.full((1, 4, 8, 8), 0.5)
    generator = torch.Generator().manual_seed(0)
    scheduler.set_timesteps(20)
    latents = torch.randn(picture.shape, generator=generator) * scheduler.init_noise_sigma
    alphas = scheduler.alphas_cumprod
    for t in scheduler.timesteps:
        model_input = scheduler.scale_model_input(latents, t)
        alpha = torch.lerp(alphas[int(t)], alphas[min(int(t) + 1, 999)], float(t) % 1)
        noise = (model_input - alpha.sqrt() * picture) / (1 - alpha).sqrt()
        keywords = {"generator": generator} if "a" in name.split("_") else {}
        latents = scheduler.step(noise, t, latents, **keywords).prev_sample
    assert (latents - picture).abs().mean() < 0.1


def test_lms_coefficients_are_integrals_of_lagrange_polynomials():
    scheduler = make_scheduler("lms", {}, "epsilon")
    scheduler.set_timesteps(10)
    sigmas = scheduler.sigmas.double()
    tau = torch.linspace(float(sigmas[5]), float(sigmas[6]), 20_001, dtype=torch.float64)
    for current in range(4):
        basis = torch.ones_like(tau)
        for k in range(4):
            if k != current:
                basis *= (tau - sigmas[5 - k]) / (sigmas[5 - current] - sigmas[5 - k])
        expected = torch.trapezoid(basis, tau).item()
        assert scheduler.get_lms_coefficient(4, 5, current) == pytest.approx(expected, rel=1e-6)


def test_zero_terminal_snr_starts_from_pure_noise(caplog):
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    plain = make_scheduler("ddim", config, "v_prediction")
    scheduler = make_scheduler("ddim", config, "v_prediction", zero_terminal_snr=True)
    assert plain.alphas_cumprod[-1] > 1e-3
    assert scheduler.alphas_cumprod[-1] < 1e-6
    scheduler.set_timesteps(10)
    assert scheduler.timesteps[0] == 999
    make_scheduler("heun", config, "v_prediction", zero_terminal_snr=True)
    assert "heun knows no zero terminal SNR" in caplog.text


@pytest.mark.parametrize(
    ("values", "epoch", "step", "due"),
    [
        ({}, None, 0, False),
        ({"sample_at_first": True}, None, 0, True),
        ({}, 1, 10, False),
        ({"sample_every_n_steps": 5}, None, 10, True),
        ({"sample_every_n_steps": 5}, None, 11, False),
        ({"sample_every_n_steps": 5}, 1, 10, False),
        ({"sample_every_n_epochs": 2}, 2, 10, True),
        ({"sample_every_n_epochs": 2}, 3, 10, False),
        ({"sample_every_n_epochs": 2, "sample_every_n_steps": 5}, None, 10, False),
    ],
)
def test_pictures_are_due_by_stocks_rules(values, epoch, step, due):
    assert should_sample(Options(**values), epoch, step) is due
