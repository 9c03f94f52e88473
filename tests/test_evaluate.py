"""`python -m minibooth.evaluate`: the paper's figures, of pictures that are drawn once for just what they depend on."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import edit_json, write_json
from encoders import CLIP_SEES, DINO_SEES, by_formula, random_lpips, small_clip, small_dino
from PIL import Image
from safetensors.torch import load_file
from single_files import folder as checkpoint_of
from small_run import changed, photographs, small, tiny, train

import minibooth
from minibooth import drawing, evaluate
from minibooth.diffusion.text_to_image import StableDiffusion
from minibooth.dreambooth.metrics import Encoder, likeness
from minibooth.errors import UserError

# As prompts_and_classes.txt is published, with prompts of our own.
PUBLISHED = """Classes

subject_name,class
backpack,backpack

Prompts

Object Prompts

prompt_list = [
'a {0} {1} on the moon'.format(unique_token, class_token),
"a {0} {1} at a dog's feet".format(unique_token, class_token),
'a photo of a {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} in a coat'.format(unique_token, class_token),
'a wet {0} {1}'.format(unique_token, class_token)
]
"""
OBJECTS = ["a sks dog on the moon", "a sks dog at a dog's feet", "a photo of a sks dog"]
LIVE = ["a sks dog in a coat", "a wet sks dog"]


class Kit:
    """Small encoders with transformers' models of them, photographs, prompts, and a command line of it all."""

    def __init__(self, folder: Path):
        self.clip, self.their_clip = small_clip(folder / "clip")
        self.dino, self.their_dino = small_dino(folder / "dino")
        self.lpips = random_lpips(folder)
        self.images = photographs(folder / "spot", count=3)
        (folder / "prompts.txt").write_text(PUBLISHED)
        self.encoders = ["--clip", self.clip, "--dino", self.dino, "--lpips", self.lpips]
        self.few = ["--steps", "1", "--num_images", "2", "--num_class_images", "3", "--prompts", folder / "prompts.txt"]
        self.subject = ["--images", self.images, "--class_noun", "dog"]

    def run(self, output: Path, *words, usual=True) -> dict:
        """Evaluate `tiny`, or what `words` say; returns what the one results.json says."""
        words = [*(["--model", tiny(), *self.subject] if usual else []), *self.encoders, *self.few, *words]
        evaluate.main(["--device", "cpu", "--output_dir", str(output), *map(str, words)])
        return json.loads(max(output.rglob("results.json"), key=lambda path: path.stat().st_mtime_ns).read_text())


@pytest.fixture(scope="module")
def kit(tmp_path_factory) -> Kit:
    return Kit(tmp_path_factory.mktemp("kit"))


@pytest.fixture(scope="module")
def whole(kit, tmp_path_factory) -> tuple[Path, dict]:
    """The folder of a whole run, and its results; read only."""
    output = tmp_path_factory.mktemp("whole")
    return output / "spot", kit.run(output)


def drawn(folder: Path) -> dict[str, list[Path]]:
    """All pictures, by their prompts."""
    prompts = {path.parent: json.loads(path.read_text())["prompt"] for path in sorted(folder.glob("drawn-*/manifest.json"))}
    return {prompt: sorted(place.glob("*.png")) for place, prompt in prompts.items()}


def states(folder: Path) -> dict[str, int]:
    """When each picture was written."""
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in folder.rglob("*.png")}


# ---- what is measured


def test_the_figures_are_those_of_transformers(kit, whole):
    """Computed once more from the files on disk, pair by pair."""
    transformers = pytest.importorskip("transformers")
    folder, results = whole
    prepare = transformers.CLIPImageProcessorPil(**CLIP_SEES), transformers.ViTImageProcessorPil(**DINO_SEES)
    words = transformers.CLIPTokenizer.from_pretrained(kit.clip)

    @torch.no_grad()
    def see(path):
        clip, dino = (each(Image.open(path).convert("RGB"), return_tensors="pt")["pixel_values"] for each in prepare)
        return kit.their_clip.get_image_features(clip).pooler_output[0], kit.their_dino(dino).last_hidden_state[0, 0]

    @torch.no_grad()
    def read(prompt):
        ids = words(prompt, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return kit.their_clip.get_text_features(ids).pooler_output[0]

    def cosine(a, b):
        return float(a @ b / a.norm() / b.norm())

    def mean(values):
        return sum(values := list(values)) / len(values)

    def like(some, others, which):
        return mean(cosine(a[which], b[which]) for a in some for b in others)

    def pixels(path):
        return torch.tensor(np.asarray(Image.open(path)) / 127.5 - 1, dtype=torch.float32).permute(2, 0, 1)[None]

    real, pictures = [see(path) for path in sorted(kit.images.glob("*.png"))], drawn(folder)
    seen = {prompt: [see(path) for path in paths] for prompt, paths in pictures.items()}
    weights, rows = load_file(kit.lpips), []
    for prompt in OBJECTS:
        pairs = itertools.combinations(map(pixels, pictures[prompt]), 2)
        row = {"DINO": like(seen[prompt], real, 1), "CLIP-I": like(seen[prompt], real, 0)}
        row["CLIP-T"] = mean(cosine(picture, read(prompt)) for picture, _ in seen[prompt])
        rows.append(row | {"DIV": mean(by_formula(weights, a, b).item() for a, b in pairs)})
    expected = {name: mean(row[name] for row in rows) for name in rows[0]} | {"PRES": like(seen["a dog"], real, 1)}
    assert results["figures"] == pytest.approx(expected, abs=1e-5)
    for row, said in zip(rows, results["prompts"], strict=True):
        assert {name: said[name] for name in row} == pytest.approx(row, abs=1e-5)
    pairs = list(itertools.combinations(real, 2))
    ceilings = {name: mean(cosine(a[i], b[i]) for a, b in pairs) for i, name in enumerate(("CLIP-I", "DINO"))}
    assert results["real"] == pytest.approx(ceilings, abs=1e-5)


def test_the_pictures_are_what_the_model_draws(whole):
    pictures, pipe = drawn(whole[0]), minibooth.load(tiny())
    assert {prompt: len(paths) for prompt, paths in pictures.items()} == dict.fromkeys(OBJECTS, 2) | {"a dog": 3}
    for prompt, paths in pictures.items():
        expected = pipe.generate([prompt] * len(paths), steps=1, seed=0)
        for path, other in zip(paths, expected, strict=True):
            assert np.abs(np.asarray(Image.open(path), int) - np.asarray(other, int)).max() <= 1


def test_the_results_say_what_they_are_of(kit, whole):
    folder, results = whole
    assert [row["prompt"] for row in results["prompts"]] == OBJECTS
    assert all(len(list((folder / row["folder"]).glob("*.png"))) == 2 for row in results["prompts"])
    settings = results["settings"]
    assert settings["seed"] == 0 and settings["model"] == str(tiny()) and settings["dino"] == str(kit.dino)
    assert results["subject"] == "spot" and results["versions"]["torch"] == torch.__version__
    assert results["model"]["sampler"] == "ddim" and len(results["model"]["weights"]) == 16


def test_what_has_no_encoder_is_left_out(kit, whole, tmp_path, capsys):
    figures = whole[1]["figures"]
    left = {"clip": {"DINO", "PRES", "DIV"}, "dino": {"CLIP-I", "CLIP-T", "PRES", "DIV"}, "lpips": figures.keys() - {"DIV"}}
    eyes, of_class = Encoder(kit.clip), [Image.open(path) for path in drawn(whole[0])["a dog"]]
    by_clip = likeness(eyes.images(of_class), eyes.images([Image.open(path) for path in sorted(kit.images.glob("*.png"))]))
    for name, columns in left.items():
        found = kit.run(tmp_path, f"--{name}", "none")["figures"]
        if name == "dino":
            assert found.pop("PRES") == pytest.approx(by_clip, abs=1e-4)
            found["PRES"] = figures["PRES"]
        assert found == {column: pytest.approx(figures[column], abs=1e-4) for column in columns}
        row = capsys.readouterr().out.splitlines()[1].split("pictures")[1].split()
        assert [cell != "-" for cell in row] == [column in columns for column in evaluate.COLUMNS]
    assert kit.run(tmp_path, "--num_images", "1", "--num_class_images", "0")["figures"].keys() == figures.keys() - {
        "DIV",
        "PRES",
    }


def test_a_single_photograph_has_no_ceiling(kit, tmp_path):
    one = photographs(tmp_path / "one", count=1)
    assert kit.run(tmp_path / "out", "--images", one)["real"] == {}


# ---- drawn once


def test_a_second_run_draws_nothing_and_finds_the_same(kit, tmp_path, monkeypatch):
    first = kit.run(tmp_path)
    before = states(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(StableDiffusion, "draw", None)
        assert kit.run(tmp_path) == first
    assert states(tmp_path) == before
    deleted = sorted(before)[2]
    (tmp_path / deleted).unlink()
    assert kit.run(tmp_path)["figures"] == pytest.approx(first["figures"], abs=1e-4)
    after = states(tmp_path)
    assert {name for name in after if after[name] != before[name]} == {deleted}


def test_no_picture_depends_on_how_many_are_drawn_at_a_time(kit, whole, tmp_path):
    """A batch of 5 has pictures of several prompts."""
    kit.run(tmp_path, "--batch_size", "5")
    ours, theirs = drawn(tmp_path / "spot"), drawn(whole[0])
    for prompt, paths in theirs.items():
        for one, other in zip(ours[prompt], paths, strict=True):
            assert np.abs(np.asarray(Image.open(one), int) - np.asarray(Image.open(other), int)).max() <= 1


CHANGES = {  # what changes, and how many pictures are drawn then
    "model": (lambda copy_of: ["--model", changed(copy_of(tiny()), "vae")], 9),
    "identifier": (lambda copy_of: ["--identifier", "cat"], 6),
    "noun": (lambda copy_of: ["--class_noun", "cat"], 9),
    "steps": (lambda copy_of: ["--steps", "2"], 9),
    "negative prompt": (lambda copy_of: ["--negative_prompt", "a cat"], 9),
    "guidance": (lambda copy_of: ["--guidance_scale", "1"], 9),
    "resolution": (lambda copy_of: ["--resolution", "32"], 9),
    "seed": (lambda copy_of: ["--seed", "1"], 4),  # of each prompt one more
    "more": (lambda copy_of: ["--num_images", "3"], 3),
    "live": (lambda copy_of: ["--live"], 4),
    "a copy of the model": (lambda copy_of: ["--model", copy_of(tiny())], 0),
}


@pytest.mark.parametrize("change, count", CHANGES.values(), ids=CHANGES)
def test_what_was_drawn_for_something_else_is_not_reused(kit, tmp_path, copy_of, change, count):
    kit.run(tmp_path / "out", "--lpips", "none")
    before = states(tmp_path / "out")
    kit.run(tmp_path / "out", "--lpips", "none", *change(copy_of))
    after = states(tmp_path / "out")
    assert len(after) - len(before) == count and before.items() <= after.items()


# ---- prompts


def test_the_published_file_is_read(kit, tmp_path):
    assert [row["prompt"] for row in kit.run(tmp_path, "--live", "--identifier", "xyz")["prompts"]] == [
        prompt.replace("sks", "xyz") for prompt in LIVE
    ]


def test_without_an_identifier_nothing_stands_in_its_place(kit, tmp_path):
    found = kit.run(tmp_path, "--live", "--identifier", "", "--class_noun", "old dog")["prompts"]
    assert [row["prompt"] for row in found] == ["a old dog in a coat", "a wet old dog"]


@pytest.mark.parametrize("live", [[], ["--live"]])
def test_our_own_prompts_are_the_papers_kind(live):
    words = ["--model", "owner/name", "--images", "spot", "--identifier", "sks", "--class_noun", "dog", *live]
    evaluate.complete(flags := evaluate.parser().parse_args(words))
    found = evaluate.prompts(flags)
    assert len(set(found)) == 25 and all("sks dog" in prompt and "{" not in prompt for prompt in found)


# ---- models, and what their run.json says


def test_a_trained_model_says_what_it_was_taught(kit, tmp_path):
    photographs(tmp_path / "photographs")
    settings = small(tmp_path, max_train_steps=1, instance_prompt="a picture of some zwx old dog", resolution=32,
                     class_prompt="a picture of some old dog")  # fmt: skip
    model = train(settings)
    results = kit.run(tmp_path / "out", "--model", model, usual=False)
    assert results["subject"] == "photographs"
    assert results["prompts"][0]["prompt"] == "a zwx old dog on the moon"
    assert Image.open(next((tmp_path / "out").rglob("*.png"))).size == (32, 32)


def test_a_lora_says_so_too_and_counts(kit, tmp_path):
    lora = train(small(tmp_path, rank=2, learning_rate=1.0, max_train_steps=2))
    results = kit.run(tmp_path / "out", "--model", tiny(), "--lora", lora, usual=False)
    assert results["prompts"][0]["prompt"] == OBJECTS[0]
    assert len(drawn(tmp_path / "out" / "photographs")) == 4
    for weight in (0.5, 0.0):
        other = kit.run(tmp_path / "out", "--model", tiny(), "--lora", lora, "--lora_weight", weight, usual=False)
        assert other["figures"] != results["figures"]
    plain = kit.run(tmp_path / "plain", "--images", tmp_path / "photographs")
    assert other["figures"] == pytest.approx(plain["figures"], abs=1e-4)


def test_models_of_other_programs(kit, tmp_path):
    """A single file has its folder's figures."""
    folder = checkpoint_of("sd1")
    minibooth.load(folder).save(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").with_name("tokenizer").symlink_to(folder / "tokenizer")
    of_file = kit.run(tmp_path / "file", "--model", tmp_path / "model.safetensors", "--resolution", "64")
    of_folder = kit.run(tmp_path / "folder", "--model", folder, "--resolution", "64")
    assert of_file["model"]["weights"] == of_folder["model"]["weights"]
    assert of_file["figures"] == pytest.approx(of_folder["figures"], abs=1e-4)


@pytest.mark.parametrize(
    "instance, of_class, words",
    [
        ("a photo of sks dog", "a photo of dog", ("sks", "dog")),
        ("a photo of a ohwx teddy bear", "a photo of a teddy bear", ("ohwx", "teddy bear")),
        ("a photo of sks dog", "", ("sks", "dog")),
        ("a photo of zwx robot", "robot", ("zwx", "robot")),
        ("A photo of the sks dog.", "a photo of a dog", ("sks", "dog")),
        ("a photo of sks dog by the sea", "a photo of dog", ("sks", "dog")),
        ("sks dog in a park", "a dog in a park", ("sks", "dog")),
        ("a photo of sks dog", "a photo of a dog in the park", ("sks", "dog")),
        ("a photo of sks dog, highly detailed", "a photo of a dog, highly detailed", ("sks", "dog")),
        ("a man with sks backpack", "a backpack", ("sks", "backpack")),
        ("a fluffy <sks> dog, watercolor", "a dog", ("fluffy <sks>", "dog")),
        ("ohwx dog", None, None),
        ("a photo of sks", "", None),
    ],
)
def test_the_words_are_those_of_the_instance_prompt(tmp_path, monkeypatch, instance, of_class, words):
    """Of the LoRA's, where there is one on a model that was trained before."""
    monkeypatch.chdir(tmp_path)
    Path("spot").mkdir()
    said = {"instance_prompt": instance, "class_prompt": of_class, "instance_data_dir": "spot"}
    write_json(tmp_path / "run.json", {"settings": said})
    write_json(tmp_path / "below" / "run.json", {"settings": said | {"instance_prompt": "a olis cat", "class_prompt": "a cat"}})
    for places in (["{}"], ["{}/model.safetensors"], ["{}/below", "--lora", "{}"], ["{}/below", "--lora", "{}/x.safetensors"]):
        places = ["--model", *(place.format(tmp_path) for place in places)]
        flags = evaluate.parser().parse_args(places)
        if words is None:
            with pytest.raises(minibooth.errors.UserError, match="--class_noun is missing"):
                evaluate.complete(flags)
            continue
        evaluate.complete(flags)
        assert (flags.identifier, flags.class_noun) == words and flags.images == "spot"
        flags = evaluate.parser().parse_args([*places, "--identifier", "a", "--class_noun", "b", "--images", "c"])
        evaluate.complete(flags)
        assert (flags.identifier, flags.class_noun, flags.images) == ("a", "b", Path("c"))
        if of_class:  # which shows the identifier, whatever the noun is to be
            flags = evaluate.parser().parse_args([*places, "--class_noun", "poodle"])
            evaluate.complete(flags)
            assert (flags.identifier, flags.class_noun) == (words[0], "poodle")


def test_another_subjects_figures_are_not_replaced(kit, tmp_path):
    write_json(tmp_path / kit.images.name / "results.json", {"settings": {"images": str(tmp_path / "other" / kit.images.name)}})
    with pytest.raises(minibooth.errors.UserError, match="has the figures of .*other.*another name with --subject"):
        kit.run(tmp_path)


def test_pictures_too_small_for_lpips_are_refused_before_they_are_drawn(kit, tmp_path):
    with pytest.raises(minibooth.errors.UserError, match="32 pixels or more"):
        kit.run(tmp_path, "--resolution", "24")
    assert not [*tmp_path.rglob("*.png")]


def test_a_class_noun_that_is_given_shows_the_identifier(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(minibooth.errors.UserError, match="--images is missing"):  # the run's lay elsewhere
        write_json(tmp_path / "run.json", {"settings": {"instance_prompt": "a photo of zwx dog", "instance_data_dir": "spot"}})
        evaluate.complete(evaluate.parser().parse_args(["--model", str(tmp_path), "--class_noun", "dog"]))
    Path("spot").mkdir()
    write_json(tmp_path / "run.json", {"settings": {"instance_prompt": "a photo of zwx dog", "instance_data_dir": "spot"}})
    flags = evaluate.parser().parse_args(["--model", str(tmp_path), "--class_noun", "dog"])
    evaluate.complete(flags)
    assert flags.identifier == "zwx"
    flags = evaluate.parser().parse_args(["--model", str(tmp_path), "--class_noun", "cat"])
    with pytest.raises(minibooth.errors.UserError, match="--identifier is missing.*a photo of zwx dog"):
        evaluate.complete(flags)


@pytest.mark.parametrize("settings", [None, ["a dog"], {"instance_prompt": 5, "class_prompt": ["a"], "resolution": "64"}])
def test_a_run_json_that_makes_no_sense_says_nothing(tmp_path, settings):
    write_json(tmp_path / "run.json", {"settings": settings})
    flags = evaluate.parser().parse_args(["--model", str(tmp_path), "--images", "c"])
    with pytest.raises(minibooth.errors.UserError, match="--class_noun is missing"):
        evaluate.complete(flags)
    assert flags.resolution is None


@pytest.mark.parametrize("there", [True, False])
def test_the_embedded_model_has_its_own_encoder(tmp_path, monkeypatch, there):
    monkeypatch.setattr(drawing, "WEIGHTS", tmp_path)
    monkeypatch.setitem(evaluate.TINY_EYES, "clip", str(tmp_path / "tiny-clip"))
    if there:
        (tmp_path / "tiny-clip").mkdir()
    monkeypatch.chdir(tmp_path)
    trained = tmp_path / "output" / "trained"
    write_json(trained / "run.json", {"settings": {"pretrained_model_name_or_path": str(tmp_path / "tiny")}})
    for model, own in ((tmp_path / "tiny", there), ("tiny", there), (trained, there), ("owner/name", False)):
        flags = evaluate.parser().parse_args(["--model", str(model), "--class_noun", "robot", "--images", "."])
        evaluate.complete(flags)
        assert flags.subject == tmp_path.name
        assert (flags.clip, flags.dino) == tuple((evaluate.TINY_EYES if own else evaluate.PUBLISHED).values())


def test_the_embedded_model_is_measured_on_what_its_world_has():
    flags = evaluate.parser().parse_args([])
    evaluate.complete(flags)
    assert (flags.identifier, flags.class_noun, flags.subject, flags.resolution) == ("zwx", "robot", "robot", 64)
    found, tokenizer = evaluate.prompts(flags), minibooth.load(flags.model).tokenizer
    assert len(set(found)) == 25 and "a photo of a zwx robot on the moon" in found
    assert all([*map("{}</w>".format, prompt.split())] == tokenizer.tokens(prompt) for prompt in found)
    flags = evaluate.parser().parse_args(["--live", "--resolution", "32"])
    evaluate.complete(flags)
    assert "a zwx robot wearing a bow tie" in evaluate.prompts(flags) and flags.resolution == 32


def test_other_encoders_than_the_papers_do_not_stand_beside_its_figures(kit, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(evaluate.TINY_EYES, "clip", str(kit.clip))
    kit.run(tmp_path, "--dino", "none")
    assert "paper" not in capsys.readouterr().out
    kit.run(tmp_path, "--clip", "none", "--subject", "another")
    assert "paper" in capsys.readouterr().out


# ---- the table


def test_the_table_has_every_subject_their_mean_and_the_paper(kit, tmp_path, capsys):
    first = kit.run(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["DINO", "CLIP-I", "CLIP-T", "PRES", "DIV"] and len({*map(len, lines[:-1])}) == 1
    assert lines[1].startswith("spot, 3 x 2 pictures") and lines[2].startswith("real pictures")
    assert lines[1].split()[-5:] == [f"{first['figures'][name]:.3f}" for name in evaluate.COLUMNS]
    assert lines[2].split()[-5:] == [f"{first['real'][name]:.3f}" for name in ("DINO", "CLIP-I")] + ["-", "-", "-"]
    paper = [line for line in lines if line.startswith("paper: DreamBooth, Stable Diffusion")]
    assert [line.split()[-5:] for line in paper] == [["0.668", "0.803", "0.305", "-", "-"]]
    assert lines[-1] == str(tmp_path / "spot" / "results.json")

    second = kit.run(tmp_path, "--subject", "the other", "--live", "--lpips", "none")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines[1:3]] == ["spot", "the other"] and lines[3].startswith("mean of 2 subjects")
    means = [(first["figures"][name] + second["figures"][name]) / 2 for name in evaluate.COLUMNS[:-1]]
    assert lines[3].split()[-5:] == [*(f"{value:.3f}" for value in means), "-"]


DAMAGED = [
    "{}",
    "[",
    '{"prompts": [], "settings": null}',
    '{"prompts": [], "settings": {}, "figures": {"DINO": "0.5"}, "real": {}}',
]


@pytest.mark.parametrize("damaged", DAMAGED)
def test_damaged_results_of_another_subject_are_left_out(kit, tmp_path, capsys, damaged):
    (tmp_path / "another").mkdir()
    (tmp_path / "another" / "results.json").write_text(damaged)
    figures = kit.run(tmp_path, "--subject", "kept/spot", "--lpips", "none")["figures"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{tmp_path / 'another' / 'results.json'} is left out")
    assert lines[2].split()[-5:-1] == [f"{figures[name]:.3f}" for name in evaluate.COLUMNS[:-1]]
    assert lines[3].startswith("real pictures") and (tmp_path / "another" / "results.json").read_text() == damaged


@pytest.mark.parametrize("damaged", ["[", '{"settings": null}', '{"settings": {"images": 5}}'])
def test_damaged_results_of_the_subject_itself_are_a_mistake(kit, tmp_path, mistake, damaged):
    (tmp_path / "spot").mkdir()
    (tmp_path / "spot" / "results.json").write_text(damaged)
    words = ["--model", tiny(), *kit.subject, *kit.encoders, *kit.few, "--output_dir", tmp_path]
    assert f"{tmp_path / 'spot' / 'results.json'}" in mistake(evaluate, *words)
    assert (tmp_path / "spot" / "results.json").read_text() == damaged


@pytest.mark.parametrize("changes", [{"image_mean": None}, {"image_std": [0, 0, 0]}, {"rescale_factor": "x"}])
def test_an_encoder_that_sees_nothing_is_refused(kit, tmp_path, changes):
    folder = shutil.copytree(kit.clip, tmp_path / "clip")
    edit_json(folder / "preprocessor_config.json", **changes)
    with pytest.raises(UserError, match=f"{folder}"):
        Encoder(folder)


# ---- mistakes

MISTAKES = {
    "no photographs": (["--images", "/nowhere"], "/nowhere"),
    "no model": (["--model", "/nowhere"], "/nowhere is missing"),
    "no prompts": (["--prompts", "/nowhere"], "--prompts /nowhere is missing"),
    "no encoder": (["--dino", "/nowhere"], "--dino none leaves its figures out"),
    "no lpips": (["--lpips", "/nowhere"], "--lpips none"),
    "no pictures": (["--num_images", "0"], "--num_images: 0 is not within 1 and 100000"),
    "no resolution": (["--resolution", "0"], "--resolution: 0 is not within"),
    "unknown": (["--promts", "x"], "--promts"),
}


@pytest.mark.parametrize("words, reason", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_ends_with_one_line_and_status_2(kit, tmp_path, mistake, words, reason):
    usual = ["--model", tiny(), *kit.subject, *kit.encoders, *kit.few, "--output_dir", tmp_path / "out"]
    assert reason in mistake(evaluate, *usual, *words)
    assert not list(tmp_path.rglob("*.*"))


def test_the_encoders_may_not_be_swapped(kit, tmp_path, mistake):
    usual = ["--model", tiny(), *kit.subject, *kit.few, "--output_dir", tmp_path / "out"]
    assert "--clip" in mistake(evaluate, *usual, "--clip", kit.dino, "--dino", kit.clip)


def test_what_a_model_does_not_say_is_asked_for(kit, tmp_path, mistake):
    assert "--images is missing" in mistake(evaluate, "--model", tiny(), "--class_noun", "dog")
    assert "--class_noun is missing" in mistake(evaluate, "--model", tiny(), "--images", kit.images)


def test_a_file_without_prompts_is_refused(kit, tmp_path, mistake):
    (tmp_path / "mine.txt").write_text("a {0} {1} en la montaña", "latin-1")
    (tmp_path / "things.txt").write_text(PUBLISHED.partition("Live")[0])
    usual = ["--model", tiny(), *kit.subject, *kit.encoders]
    assert "mine.txt has no prompts" in mistake(evaluate, *usual, "--prompts", tmp_path / "mine.txt")
    assert "things.txt has no live prompts" in mistake(evaluate, *usual, "--live", "--prompts", tmp_path / "things.txt")
