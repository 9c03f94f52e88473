"""report.html says on one page, which needs nothing else, what the run's folder says."""

import base64
import io
import json
import os
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from comparing import differing, weights
from encoders import small_clip
from PIL import Image
from small_run import metrics, photographs, small, train, trainer

import minibooth
from minibooth.dreambooth import report
from minibooth.dreambooth.journal import Journal
from minibooth.dreambooth.metrics import Encoder, ceiling, likeness
from minibooth.dreambooth.settings import Settings
from minibooth.errors import UserError

pytestmark = pytest.mark.usefixtures("few_drawing_steps")
VOID = {"meta", "img", "input", "link", "br"}


class Page(HTMLParser):
    """A page whose every element is closed, in order: (tag, attributes, text directly in it) of each."""

    def __init__(self, path: Path):
        super().__init__()
        self.source, self.elements, self.open = path.read_text(encoding="utf-8"), [], []
        self.feed(self.source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append([tag, dict(attributes), ""])
        if tag not in VOID:
            self.open.append(self.elements[-1])

    def handle_startendtag(self, tag, attributes):
        self.elements.append([tag, dict(attributes), ""])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, text):
        if self.open:
            self.open[-1][2] += text

    def all(self, tag):
        return [(attributes, text) for name, attributes, text in self.elements if name == tag]

    def curves(self):
        """Points of each polyline, by the names of its chart and its class."""
        charts = [e for e in self.elements if e[0] in ("svg", "polyline")]
        found, chart = {}, ""
        for tag, attributes, _ in charts:
            if tag == "svg":
                chart = attributes["aria-label"].removesuffix(" by step")
            else:
                found[chart, attributes["class"]] = [tuple(map(float, p.split(","))) for p in attributes["points"].split()]
        return found

    def grids(self):
        return [int(attributes["data-step"]) for attributes, _ in self.all("img") if "data-step" in attributes]


def pixels(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition("base64,")[2])))


def run(folder: Path, lines: list[dict], grids=(), **changes) -> Page:
    """The page of a run that left these lines of metrics and these steps' grids."""
    settings = small(folder, **changes)
    output = Path(settings.output_dir)
    Journal(settings).open(0)
    (output / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (output / "samples").mkdir()
    for name in (*(f"step-{step}" for step in grids), "before-after"):
        Image.new("RGB", (64, 32)).save(output / "samples" / f"{name}.png")
    report.write(output)
    return Page(output / "report.html")


def steps(count: int) -> list[dict]:
    return [
        {"step": i, "loss": 2 / i, "subject": 1 / i, "prior": 1 / i, "lr": 1e-6, "seconds": 3.0} for i in range(1, count + 1)
    ]


def test_nothing_is_needed_besides_the_page(tmp_path):
    page = run(tmp_path, steps(50), [0, 50], validation_prompt="a sks dog")
    assert page.source.startswith("<!doctype html>") and "prefers-color-scheme: dark" in page.source
    assert not re.search(r"https?://|url\(|@import|<link|<iframe", page.source)
    assert all("src" not in attributes for attributes, _ in page.all("script"))
    linked = {value for _, attributes, _ in page.elements for name, value in attributes.items() if name in ("src", "href")}
    assert len(linked) == 4 and all(value.startswith("data:image/") for value in linked)


def test_every_picture_and_the_slider_have_words(tmp_path):
    page = run(tmp_path, steps(50), [0, 50], validation_prompt="a sks dog")
    assert all(attributes["alt"] for attributes, _ in page.all("img"))
    assert all(attributes["aria-label"] for attributes, _ in page.all("svg") + page.all("input"))
    assert page.all("html")[0][0]["lang"] and page.all("title")[0][1] and len(page.all("h1")) == 1


def test_a_curve_has_a_point_for_each_line(tmp_path):
    lines = steps(50)
    for line in lines[9::10]:
        line |= {"class drift": line["step"] / 7, "broken": float("nan")}
    curves = run(tmp_path, lines, with_prior_preservation=True, class_prompt="a dog").curves()
    lengths = {name: len(points) for name, points in curves.items()}
    noisy = {("subject, prior", f"c{i}{kind}"): 50 for i in (0, 1) for kind in ("", " faint")}
    noisy |= {("loss", "c0"): 50, ("loss", "c0 faint"): 50}
    assert lengths == noisy | {("lr", "c0"): 50, ("seconds", "c0"): 50, ("class drift", "c0"): 5}
    raw = curves["loss", "c0 faint"]
    xs, ys = zip(*raw, strict=True)
    assert all(b - a == pytest.approx(xs[1] - xs[0], abs=0.2) for a, b in zip(xs, xs[1:], strict=False))
    scale = (ys[-1] - ys[0]) / (lines[0]["loss"] - lines[-1]["loss"])
    assert all(y == pytest.approx(ys[0] + scale * (2 - line["loss"]), abs=0.1) for y, line in zip(ys, lines, strict=True))


def test_a_prior_that_is_not_there_is_not_drawn(tmp_path):
    curves = run(tmp_path, [line | {"prior": 0.0} for line in steps(50)]).curves()
    assert {name for name, _ in curves} == {"subject", "loss", "lr", "seconds"}


def test_a_long_run_is_thinned_to_means(tmp_path):
    assert report.thinned([(i, float(i % 3)) for i in range(3000)]) == [(3 * i + 1, 1.0) for i in range(1000)]
    page = run(tmp_path, steps(10_000))
    assert {len(points) for points in page.curves().values()} == {1000}
    assert "10000 steps" in page.source and "500.0 minutes" in page.source
    pictures = sum(len(attributes["src"]) for attributes, _ in page.all("img"))
    assert len(page.source) - pictures < 150_000


def test_grids_come_in_the_order_of_their_steps_and_photographs_as_thumbnails(tmp_path):
    large = photographs(tmp_path / "photographs") / "large.jpg"
    exif = Image.Exif()
    exif[0x010F] = "the maker of the camera"
    Image.new("RGB", (2000, 1000)).save(large, exif=exif)
    page = run(tmp_path, steps(5), [100, 0, 1000, 20], validation_prompt="a sks dog | a < b")
    assert page.grids() == [0, 20, 100, 1000]
    assert page.all("input")[0][0]["max"] == "3"
    assert [text.strip() for _, text in page.all("li")] == ["a sks dog", "a < b"]
    real = [pixels(attributes["src"]) for attributes, _ in page.all("img") if "data-step" not in attributes]
    assert [image.size for image in real] == [(48, 40)] * 3 + [(480, 240)]
    assert not real[-1].getexif()


def test_pictures_that_are_gone_are_left_out(tmp_path):
    run(tmp_path, steps(5), [0, 5])
    output = tmp_path / "output"
    (output / "samples" / "step-0.png").write_bytes(b"no picture")
    (tmp_path / "photographs").rename(tmp_path / "elsewhere")
    report.write(output)
    page = Page(output / "report.html")
    assert page.grids() == [5] and len(page.all("img")) == 1
    with pytest.raises(UserError, match="run.json is missing"):
        report.write(tmp_path)


def test_a_last_grid_that_is_no_picture_has_no_caption(tmp_path):
    run(tmp_path, steps(5), [0, 5], validation_prompt="a sks dog")
    output = tmp_path / "output"
    (output / "samples" / "step-5.png").write_bytes(b"no picture")
    report.write(output)
    page = Page(output / "report.html")
    assert page.grids() == [0] and [text for _, text in page.all("li")] == ["a sks dog"]


def test_an_axis_has_a_few_round_numbers():
    """1, 2 or 5, and zeros, from one to the next; all that fit."""
    for low, high in [(0.0, 10 ** (i / 7)) for i in range(-40, 40)] + [(-3e-6, 7e-6), (100.0, 2400.0), (0.31, 0.32)]:
        found = report.ticks(low, high)
        step = found[1] - found[0]
        assert 2 <= len(found) <= 8 and f"{step:.3e}".split("e")[0] in ("1.000", "2.000", "5.000")
        assert found == pytest.approx([step * round(x / step) for x in found])
        assert low <= found[0] < low + step * 1.001 and high - step * 1.001 < found[-1] <= high


def test_a_run_that_has_not_begun_has_a_page(tmp_path):
    assert not run(tmp_path, []).curves()


def test_text_stays_text(tmp_path):
    evil = "a <script>alert('$x')</script> \"dog\" & 'cat' --x"
    page = run(tmp_path, [line | {"<i>": 1} for line in steps(3)], [0], instance_prompt=evil, validation_prompt=evil)
    assert page.all("h1")[0][1] == page.all("title")[0][1] == page.all("li")[0][1] == evil
    assert len(page.all("script")) == 1 and not page.all("i")
    command = json.loads((tmp_path / "output" / "run.json").read_text())["command"]
    assert shlex.split(page.all("pre")[0][1].replace("\\\n", "")) == shlex.split(command)


def test_settings_that_were_given_come_first(tmp_path):
    page = run(tmp_path, steps(3), noise_levels=(0, 20))
    given, usual = re.findall("<table>(.*?)</table>", page.source, re.S)
    names = [set(re.findall(r"<tr><td>(\w+)</td>", table)) for table in (given, usual)]
    expected = {name for name, value in vars(small(tmp_path, noise_levels=(0, 20))).items() if value != vars(Settings())[name]}
    assert names == [expected, vars(Settings()).keys() - expected]
    assert page.source.index(given) < page.source.index("<details>") < page.source.index(usual)
    assert "[0, 20]" in given


@pytest.mark.parametrize("values, stop", [((0.2, 0.6, 0.97, 1.0, 0.9), 6), ((0.5, 0.4, 0.3), 0), ((0.1, 0.2), 3)])
def test_the_stop_step_is_the_first_with_nearly_all_of_the_rise(values, stop, tmp_path):
    lines = [{"step": 3 * i, "subject_similarity": value} for i, value in enumerate(values)]
    page = run(tmp_path, lines)
    (said,) = (text for _, text in page.all("p") if "similarity" in text)
    assert f"stop at step {stop}:" in said and "95%" in said
    assert 'class="mark"' in page.source and 'class="mark"' not in run(tmp_path / "without", steps(5)).source


def test_a_page_appears_whole_or_stays_as_it_was(tmp_path, monkeypatch):
    run(tmp_path, steps(5))
    output = tmp_path / "output"
    before = (output / "report.html").read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        report.write(output)
    assert (output / "report.html").read_bytes() == before
    assert not [*output.glob(".report*")]


# ---- in training


def test_a_run_writes_it_at_every_validation_and_goes_on_with_it(tmp_path, monkeypatch):
    written, write = [], report.write
    monkeypatch.setattr(report, "write", lambda folder: (write(folder), written.append(Page(folder / "report.html").grids())))
    watched = {"validation_prompt": "a sks dog", "validation_steps": 2, "num_validation_images": 1}
    output = train(small(tmp_path, max_train_steps=2, checkpointing_steps=2, **watched))
    assert written == [[0], [0, 2]]
    train(small(tmp_path, max_train_steps=3, resume_from_checkpoint="latest", **watched))
    assert written[2:] == [[0, 2], [0, 2, 3]]
    curves = Page(output / "report.html").curves()
    assert len(curves["subject", "c0"]) == len(metrics(output)) == 3


def test_super_resolution_has_one_too(x4, tmp_path):
    output = train(
        small(tmp_path, x4, resolution=32, max_train_steps=1, validation_prompt="a sks dog", num_validation_images=2)
    )
    page = Page(output / "report.html")
    assert page.grids() == [0, 1] and len(page.all("img")) == 5 and ("loss", "c0") in page.curves()
    assert "from left to right" in (output / "report.html").read_text()


def test_a_metrics_model_measures_every_grid_and_changes_nothing_else(tmp_path):
    clip, _ = small_clip(tmp_path / "clip")
    watched = {"validation_prompt": "a sks dog | a wet sks dog", "validation_steps": 2, "num_validation_images": 2}
    watched |= {"class_prompt": "a dog", "max_train_steps": 4, "checkpointing_steps": 2, "metrics_model": str(clip)}
    plain = train(small(tmp_path, **watched | {"metrics_model": None, "output_dir": str(tmp_path / "plain")}))
    output = train(small(tmp_path, **watched))
    assert not differing(weights(output), weights(plain))
    seen = [line for line in metrics(output) if "loss" not in line]
    assert [line for line in metrics(output) if "loss" in line] == metrics(plain)
    assert [line["step"] for line in seen] == [0, 2, 4]
    assert (output / "samples" / "step-4.png").read_bytes() == (plain / "samples" / "step-4.png").read_bytes()

    eyes, grid = Encoder(clip), Image.open(output / "samples" / "step-4.png")
    real = eyes.images([Image.open(path) for path in sorted((tmp_path / "photographs").iterdir())])
    shown = eyes.images([grid.crop((x, y, x + 64, y + 64)) for y in (0, 68) for x in (0, 68)])
    assert seen[-1]["subject_similarity"] == pytest.approx(likeness(shown, real), abs=1e-5)
    how = dict(steps=2, sampler="dpmpp_2m", height=64, width=64, seed=7)
    of_class = eyes.images(minibooth.load(output).generate(["a dog"] * 2, **how))
    assert seen[-1]["class_drift"] == pytest.approx(likeness(of_class, real), abs=1e-3)
    assert seen[-1]["class_diversity"] == pytest.approx(1 - ceiling(of_class), abs=1e-3)

    curves = Page(output / "report.html").curves()
    assert all(len(curves[name, "c0"]) == 3 for name in ("subject_similarity", "class_drift", "class_diversity"))
    assert "By subject_similarity, stop at step" in (output / "report.html").read_text()
    shutil.rmtree(output / "checkpoint-4")
    train(small(tmp_path, **watched | {"resume_from_checkpoint": "checkpoint-2"}))
    assert [line for line in metrics(output) if "loss" not in line] == seen


def test_without_a_class_prompt_the_subject_alone_is_measured(tmp_path):
    clip, _ = small_clip(tmp_path / "clip")
    output = train(small(tmp_path, max_train_steps=1, validation_prompt="a sks dog", metrics_model=str(clip)))
    assert [line.keys() for line in metrics(output) if "loss" not in line] == [{"step", "subject_similarity"}] * 2


def test_a_metrics_model_that_is_not_there_or_has_nothing_to_see_is_refused(x4, tmp_path):
    for model, said in ((None, "/nowhere is no folder"), (x4, "--metrics_model is for")):
        with pytest.raises(UserError, match=said):
            trainer(small(tmp_path, model, resolution=32, validation_prompt="a dog", metrics_model="/nowhere"))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), UserError("metrics.jsonl holds something else")])
def test_a_run_does_not_end_for_want_of_its_page(error, tmp_path, monkeypatch, capsys):
    def fail(folder):
        raise error

    monkeypatch.setattr(report, "write", fail)
    assert (train(small(tmp_path, max_train_steps=1)) / "model_index.json").exists()
    assert f"report.html was not written: {error}" in capsys.readouterr().err
