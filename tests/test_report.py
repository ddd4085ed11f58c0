"""Progress bar, trackers, history, charts and report.html."""

import json
import logging
import math
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from library.training.charts import Axis, Line, format_number, line_chart, smooth, standalone
from library.training.errors import UserError
from library.training.log import setup_logging
from library.training.options import Options
from library.training.prompts import Prompt
from library.training.report import MOST_POINTS, Report, Series, peak_memory
from library.training.report_html import Run, write_report
from library.training.sampling import Sample
from library.training.trackers import check_logging, public_config, tracker_names

# Trackers


def test_tensorboard_is_on_with_a_logging_folder_alone(tmp_path):
    assert tracker_names(Options()) == []
    assert tracker_names(Options(logging_dir=str(tmp_path))) == ["tensorboard"]
    assert tracker_names(Options(log_with="wandb")) == ["wandb"]
    assert tracker_names(Options(log_with="all")) == ["tensorboard", "wandb"]


@pytest.mark.parametrize(
    ("values", "missing", "said"),
    [
        ({"log_with": "tensorboard"}, (), ["--log_with tensorboard needs --logging_dir"]),
        ({"logging_dir": "logs"}, ("tensorboard", "tensorboardX"), ["pip install tensorboard"]),
        ({"log_with": "wandb"}, ("wandb",), ["pip install wandb"]),
        ({"log_with": "all"}, ("wandb",), ["needs --logging_dir", "pip install wandb"]),
        ({"log_tracker_config": "nowhere.toml"}, (), ["there is no file nowhere.toml"]),
        ({"logging_dir": "logs"}, (), []),
        ({}, ("wandb", "tensorboard"), []),
    ],
)
def test_logging_that_cannot_work_is_named(values, missing, said, monkeypatch):
    monkeypatch.setattr("library.training.trackers.find_spec", lambda name: name not in missing)
    problems = check_logging(Options(**values))
    assert len(problems) == len(said)
    for problem, part in zip(problems, said, strict=True):
        assert part in problem


def test_tracker_config_is_checked(tmp_path):
    path = tmp_path / "trackers.toml"
    path.write_text("[tensorboard]\nflush_secs = 5\n[wandb]\n", encoding="utf-8")
    assert check_logging(Options(log_tracker_config=str(path))) == []
    path.write_text("flush_secs = 5\n", encoding="utf-8")
    assert "'flush_secs' must be a table" in check_logging(Options(log_tracker_config=str(path)))[0]
    path.write_text("[tensorboard\n", encoding="utf-8")
    assert "trackers.toml:1:" in check_logging(Options(log_tracker_config=str(path)))[0]


def test_logged_config_holds_no_secrets_and_no_paths():
    options = Options(wandb_api_key="s3cret", output_dir="/home/me", network_args=["factor=4"])
    config = public_config(options)
    assert "s3cret" not in str(config)
    assert "/home/me" not in str(config)
    assert config["network_args"] == "['factor=4']"
    assert all(isinstance(value, bool | int | float | str) for value in config.values())


def test_options_without_effect_are_named(caplog):
    Report(Options(wandb_run_name="mine", log_prefix="x"), 10, 1)
    assert "--wandb_run_name changes nothing" in caplog.text
    assert "--log_prefix changes nothing" in caplog.text


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = folder.rglob("events.out.tfevents*")
    accumulator = EventAccumulator(str(events.parent))
    accumulator.Reload()
    found = {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)]
        for tag in accumulator.Tags()["scalars"]
    }
    return found, accumulator.Tags()["images"], events


def test_tensorboard_gets_stocks_scalars(tmp_path):
    options = Options(logging_dir=str(tmp_path), log_prefix="run_", validate_every_n_steps=2)
    report = Report(options, total_steps=4, total_epochs=2)
    for step in range(1, 5):
        epoch = (step + 1) // 2
        lrs = {"unet": 1e-3, "textencoder": 1e-4}
        report.step(step, epoch, 0.1 * step, 0.2, lrs, {"norm/gradient": 2.0})
        if step % 2 == 0:
            report.validation(step, epoch, 0.5)
            report.epoch_end(epoch, 0.3)
    picture = tmp_path / "cat.png"
    Image.new("RGB", (8, 8), "red").save(picture)
    report.pictures([Sample(Prompt("cat", index=2), 1, None, 4, picture)])
    report.close()

    found, images, events = scalars(tmp_path)
    assert events.parent.name == "network_train"
    assert events.parent.parent.name.startswith("run_20")
    assert [step for step, _ in found["loss/current"]] == [1, 2, 3, 4]
    assert found["loss/current"][2][1] == pytest.approx(0.3)
    assert found["loss/average"][0] == (1, pytest.approx(0.2))
    assert found["lr/unet"][3] == (4, pytest.approx(1e-3))
    assert found["lr/textencoder"][0] == (1, pytest.approx(1e-4))
    assert found["norm/gradient"][0] == (1, 2.0)
    assert [step for step, _ in found["loss/epoch_average"]] == [1, 2]
    assert found["loss/validation/step_average"] == [(2, 0.5), (4, 0.5)]
    assert found["loss/validation/step_divergence"][0] == (2, pytest.approx(0.3))
    assert images == ["sample_2"]


def test_validation_by_epoch_is_logged_over_epochs(tmp_path):
    report = Report(Options(logging_dir=str(tmp_path), log_tracker_name="mine"), 4, 2)
    report.step(20, 2, 0.1, 0.2, {}, {})
    report.validation(20, 2, 0.5)
    report.close()
    found, _, events = scalars(tmp_path)
    assert events.parent.name == "mine"
    assert found["loss/validation/epoch_average"] == [(2, 0.5)]
    assert report.series["loss/validation/epoch_average"].steps == [20]


def test_only_the_main_process_logs_and_shows(tmp_path, capsys):
    report = Report(Options(logging_dir=str(tmp_path / "logs")), 2, 1, is_main=False)
    report.step(1, 1, 0.1, 0.1, {"unet": 1e-3}, {})
    report.flush()
    report.close()
    assert not (tmp_path / "logs").exists()
    assert capsys.readouterr().err == ""


# Progress bar and console


def test_the_bar_shows_where_training_stands(capsys):
    report = Report(Options(), total_steps=20, total_epochs=4)
    for step in range(11, 16):
        report.step(step, 3, 0.2, 0.12345, {"unet": 1e-3, "textencoder": 5e-4}, {})
    report.flush()
    report.close()
    shown = capsys.readouterr().err.split("\r")[-1]
    assert "steps:" in shown
    assert "15/20" in shown
    assert "avr_loss=0.1235" in shown or "avr_loss=0.1234" in shown
    assert "lr=1.00e-03" in shown
    assert "epoch=3/4" in shown


@pytest.fixture
def fresh_logging():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


@pytest.mark.usefixtures("fresh_logging")
def test_console_options(tmp_path, capsys, monkeypatch):
    log = logging.getLogger("library.training.anything")
    setup_logging(Options(console_log_simple=True))
    log.info("hello")
    log.debug("not this")
    logging.getLogger("diffusers").info("nor this")
    assert capsys.readouterr().err == "hello\n"
    file = tmp_path / "log.txt"
    setup_logging(Options(console_log_file=str(file), console_log_level="DEBUG"))
    log.debug("details")
    assert capsys.readouterr().err == ""
    assert "DEBUG   details" in file.read_text(encoding="utf-8")
    monkeypatch.setenv("RANK", "1")
    setup_logging(Options(console_log_simple=True))
    log.info("said by another process")
    log.warning("trouble")
    assert capsys.readouterr().err == "trouble\n"


@pytest.mark.usefixtures("fresh_logging")
def test_a_log_file_that_cannot_be_written(tmp_path):
    with pytest.raises(UserError, match="--console_log_file"):
        setup_logging(Options(console_log_file=str(tmp_path / "nowhere" / "log.txt")))


# History


def test_series_stay_bounded_and_keep_their_mean():
    series = Series()
    count = 10 * MOST_POINTS
    for step in range(1, count + 1):
        series.add(step, float(step))
    assert MOST_POINTS / 2 <= len(series.steps) < MOST_POINTS
    assert series.stride == 16
    assert series.steps[:2] == [16, 32]
    assert series.values[:2] == [8.5, 24.5]  # means of 1…16 and 17…32


def test_history_goes_through_json_and_on():
    first = Report(Options(), 10, 1, is_main=False)
    whole = Report(Options(), 10, 1, is_main=False)
    for step in range(1, 7):
        first.step(step, 1, step / 7, 0.5, {"unet": 0.1}, {"norm/gradient": 1.0})
    sample = Sample(Prompt("cat", "dog", seed=3), 3, None, 5, Path("sample") / "cat.png")
    first.pictures([sample])
    second = Report(Options(), 10, 1, is_main=False)
    saved = json.loads(json.dumps(first.history))
    second.restore(saved)
    for step in range(1, 11):
        whole.step(step, 1, step / 7, 0.5, {"unet": 0.1}, {"norm/gradient": 1.0})
        if step > 6:
            second.step(step, 1, step / 7, 0.5, {"unet": 0.1}, {"norm/gradient": 1.0})
    assert second.series == whole.series
    assert second.samples == [sample]
    assert second.seconds > saved["seconds"] > 0
    second.restore({})
    assert second.series == {}
    assert second.samples == []


def test_peak_memory_counts_this_process():
    peak, kind = peak_memory()
    assert kind == ("GPU memory" if torch.cuda.is_available() else "memory")
    if kind == "memory":
        assert 1e8 < peak < 1e12  # bytes: PyTorch alone takes more than 100 MB


# Charts


def test_axis_ticks_are_round_and_inside():
    assert Axis(0.03, 0.31, 0, 100).ticks(4) == pytest.approx([0.1, 0.2, 0.3])
    assert Axis(0, 3, 0, 100, whole=True).ticks(8) == [0, 1, 2, 3]
    assert Axis(3e-5, 2.0, 0, 100, logarithmic=True).ticks(4) == pytest.approx(
        [1e-4, 1e-2, 1.0], rel=1e-9
    )
    assert Axis(1.0, 100.0, 0, 100, logarithmic=True).place(10.0) == pytest.approx(50)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.05, "0.05"),
        (0.1 + 0.2, "0.3"),
        (-0.25, "-0.25"),
        (1e-4, "1e-4"),
        (2.5e-5, "2.5e-5"),
        (1500, "1500"),
        (25000, "25k"),
        (1.5e6, "1.5e6"),
    ],
)
def test_numbers_are_short(value, text):
    assert format_number(value) == text


def test_smoothing_is_unbiased_and_follows():
    assert smooth([2.0] * 5, span=10) == pytest.approx([2.0] * 5)
    assert smooth([3.0, 1.0], span=1) == [3.0, 1.0]
    late = smooth([0.0] * 100 + [1.0] * 100, span=10)
    assert late[99] < 0.01
    assert late[-1] > 0.99


def chart_points(svg):
    root = ET.fromstring(svg)
    path = next(e for e in root.iter() if e.tag.endswith("path"))
    return [tuple(map(float, pair.split())) for pair in path.get("d")[1:].split("L")]


def test_a_chart_places_its_points():
    points = chart_points(line_chart("Loss", [Line("a", [0, 50, 100], [1.0, 3.0, 2.0])]))
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x0 < x1 < x2
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)
    assert y1 < y2 < y0  # SVG counts downwards
    assert (y0 - y2) == pytest.approx((y0 - y1) / 2, abs=0.11)


def test_long_curves_are_thinned_without_losing_a_peak():
    values = [0.0] * 5000
    values[3333] = 7.0
    chart = line_chart("x", [Line("a", range(5000), values)])
    points = chart_points(chart)
    assert len(points) < 500
    heights = [y for _, y in points]
    assert heights.count(min(heights)) == 1
    assert min(heights) < max(heights) - 100


def test_charts_survive_odd_values():
    assert line_chart("x", []) == ""
    assert line_chart("x", [Line("a", [1], [math.nan])]) == ""
    ET.fromstring(line_chart("x", [Line("a<b>&", [1, 2, 3], [1.0, math.inf, 2.0])]))
    ET.fromstring(line_chart("x", [Line("a", [5], [0.0])]))
    ET.fromstring(line_chart("x", [Line("a", [1, 2], [-3.0, -3.0])]))
    far_apart = [Line("a", [1, 2], [1e-6, 1e-6]), Line("b", [1, 2], [1.0, 1.0], colour=9)]
    ET.fromstring(line_chart("x", far_apart))
    ET.fromstring(standalone([line_chart("x", far_apart), ""], 460, 250))


# report.html


class Page(HTMLParser):
    """Tags, attributes and text; fails on tags that are not closed in order."""

    VOID = ("meta", "img")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture
def run(tmp_path):
    options = Options.from_values(
        {
            "network_module": "networks.lokr",
            "network_args": ["factor=4"],
            "output_dir": 'a "quoted" \\ path',
            "wandb_api_key": "s3cret",
        }
    )
    options.seed = 42
    report = Report(options, 30, 1, is_main=False)
    for step in range(1, 31):
        extras = {"weight_decay/kron_outer": 0.1 / step, "weight_decay/kron_inner": 0.0}
        report.step(step, 1, 1 / step, 1 / step, {"unet": 1e-3, "textencoder": 1e-3}, extras)
    report.validation(30, 1, 0.2)
    samples = []
    for step in (0, 15, 30):
        for index, text in enumerate(("red <b>apple</b> & co", "cat")):
            path = tmp_path / "sample" / f"run_{step}_{index}.png"
            path.parent.mkdir(exist_ok=True)
            size = (64, 64) if index == 0 else (1024, 768)
            Image.new("RGB", size, (step, 90, 90)).save(path)
            samples.append(Sample(Prompt(text, index=index), 1, None, step, path))
    adapter = tmp_path / "run.safetensors"
    adapter.write_bytes(b"x" * 12_345)
    facts = [("Time", "1 min"), ("Peak memory", "1 GB")]
    return Run("run", "a LoKr", options, report.series, samples, facts, [adapter])


def test_the_page_is_whole_and_needs_nothing_else(run, tmp_path):
    written = write_report(run, tmp_path)
    assert [path.name for path in written] == ["report.html", "run_curves.svg"]
    ET.parse(written[1])
    text = written[0].read_text(encoding="utf-8")
    page = Page(text)
    assert not page.all("script")
    assert not page.all("link")
    images = page.all("img")
    assert len(images) == 2 * (2 + 3)  # first and last, and all three folded away
    assert all(image["src"].startswith("data:image/") for image in images)
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "red <b>apple</b> & co" in page.text
    for part in ("1 min", "Peak memory", "run.safetensors", "12.3 kB", "run_curves.svg"):
        assert part in page.text


def test_the_page_shows_every_curve(run, tmp_path):
    write_report(run, tmp_path)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    titles = [svg["aria-label"] for svg in page.all("svg")]
    assert titles == ["Loss", "Loss", "Learning rate: unet, textencoder", "Weight decay by role"]
    assert "Learning rate: unet, textencoder" in page.text  # equal curves are one
    assert "kron outer" in page.text
    assert "validation, by epoch" in page.text


def test_the_page_holds_the_whole_config_but_no_secret(run, tmp_path):
    write_report(run, tmp_path)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "s3cret" not in page.text
    start = page.text.index("network_module =")
    config = page.text[page.text.index("Settings") + len("Settings") : start] + page.text[start:]
    blocks = config.split(" settings left as they are by default")
    chosen = toml_of(blocks[0].rsplit("\n", 1)[0])
    assert chosen["network_args"] == ["factor=4"]
    assert chosen["output_dir"] == 'a "quoted" \\ path'
    assert chosen["seed"] == 42  # chosen by the run, not given
    assert "learning_rate" not in chosen
    assert toml_of(blocks[1])["learning_rate"] == 2e-6


def toml_of(text):
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    lines = [line for line in text.splitlines() if " = " in line]
    return tomllib.loads("\n".join(lines))


def test_a_run_without_curves_or_pictures_has_a_page_too(tmp_path):
    written = write_report(Run("empty", "nothing trained", Options(), {}), tmp_path)
    assert [path.name for path in written] == ["report.html"]
    Page(written[0].read_text(encoding="utf-8"))


def test_large_pictures_are_shown_smaller(run, tmp_path):
    write_report(run, tmp_path)
    sources = [i["src"] for i in Page((tmp_path / "report.html").read_text("utf-8")).all("img")]
    assert {source.split(";")[0] for source in sources} == {"data:image/png", "data:image/webp"}
