"""The encoders: the numbers of transformers on the same files, LPIPS by its formula, and what is refused."""

import json

import numpy as np
import pytest
import torch
from comparing import error
from conftest import edit_json, write_json
from encoders import CLIP_SEES, DINO_SEES, by_formula, random_lpips, small_clip, small_dino
from PIL import Image
from safetensors.torch import load_file, save_file

from minibooth.dreambooth import metrics
from minibooth.dreambooth.metrics import Encoder, Watch, open_lpips
from minibooth.errors import UserError
from minibooth.models.config import ViTConfig
from minibooth.models.vision import CLIP, LPIPS, VisionModel, from_vit, preprocessor

PROMPTS = ["a photo of sks dog", "", "a cat! " * 60]
SIZES = [(32, 32), (47, 31), (30, 90), (200, 133)]

# config.json of the published models.
BASE = dict(
    model_type="clip", projection_dim=512,
    text_config=dict(hidden_size=512, intermediate_size=2048, num_attention_heads=8, vocab_size=49408, projection_dim=512),
    vision_config=dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12, patch_size=32, projection_dim=512),
)  # fmt: skip
LARGE = dict(
    model_type="clip", projection_dim=768,
    text_config=dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12, vocab_size=49408),
    vision_config=dict(
        hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=24, patch_size=14,
    ),
)  # fmt: skip


def pictures(sizes=SIZES):
    draw = np.random.default_rng(0)
    return [Image.fromarray(draw.integers(0, 256, (high, wide, 3), dtype=np.uint8)) for wide, high in sizes]


def published(folder, change=None, drop=(), **settings):
    """Rewrite a folder's weights through `change` and without `drop`, and its config.json with `settings`."""
    state = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in (change or (lambda x: x))(state).items() if k not in drop}, folder / "model.safetensors")
    edit_json(folder / "config.json", **settings)
    return folder


@pytest.fixture(scope="module", params=["quick_gelu", "gelu"])
def clip(request, tmp_path_factory):
    return small_clip(tmp_path_factory.mktemp("clip"), request.param)


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    return small_dino(tmp_path_factory.mktemp("dino"))


# ---- the numbers of transformers


@pytest.mark.parametrize("size", [(224, 224), (225, 300), (640, 427), (100, 37), (31, 500)])
@pytest.mark.parametrize("new", [False, True], ids=["old", "new"])
def test_pictures_are_prepared_as_transformers_does(size, new, tmp_path):
    """The files' older form, and what transformers writes today: to the same bits."""
    transformers = pytest.importorskip("transformers")
    for processor, sees in (
        (transformers.CLIPImageProcessorPil, CLIP_SEES | {"size": 224, "crop_size": 223}),
        (transformers.ViTImageProcessorPil, DINO_SEES | {"size": 224}),
        (transformers.ViTImageProcessorPil, DINO_SEES | {"size": 224, "rescale_factor": 1 / 127.5}),
    ):
        theirs = processor(**sees)
        theirs.save_pretrained(tmp_path)
        said = json.loads((tmp_path / "preprocessor_config.json").read_text()) if new else sees
        for picture in pictures([size]):
            expected = theirs(picture, return_tensors="pt")["pixel_values"][0]
            assert torch.equal(preprocessor(said)(picture), expected)


def test_clip_gives_the_numbers_of_transformers(clip):
    folder, model = clip
    eyes = Encoder(folder)
    pixels, ids = torch.stack([eyes.preprocess(picture) for picture in pictures()]), eyes.tokenizer(PROMPTS)
    with torch.no_grad():
        assert error(eyes.images(pictures()), model.get_image_features(pixels).pooler_output) <= 1e-5
        assert error(eyes.texts(PROMPTS), model.get_text_features(ids).pooler_output) <= 1e-5


def test_dino_gives_the_numbers_of_transformers(dino):
    folder, model = dino
    eyes = Encoder(folder)
    pixels = torch.stack([eyes.preprocess(picture) for picture in pictures()])
    with torch.no_grad():
        assert error(eyes.images(pictures()), model(pixels).last_hidden_state[:, 0]) <= 1e-5


@pytest.mark.parametrize("height, width", [(32, 32), (40, 40), (64, 24), (37, 85)])
def test_pictures_of_another_size_see_interpolated_places(clip, dino, height, width):
    pixels = torch.randn((2, 3, height, width), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = dino[1](pixels, interpolate_pos_encoding=True).last_hidden_state[:, 0]
        assert error(Encoder(dino[0]).network(pixels), theirs) <= 1e-5
        theirs = clip[1].get_image_features(pixels, interpolate_pos_encoding=True).pooler_output
        assert error(Encoder(clip[0]).network(pixels), theirs) <= 1e-5


# ---- the published files


@pytest.mark.parametrize("config", [BASE, LARGE], ids=["clip-vit-base-patch32", "clip-vit-large-patch14"])
def test_clip_has_the_published_names_and_shapes(config):
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        ours, theirs = CLIP(config), transformers.CLIPModel(transformers.CLIPConfig(**config))
    assert shapes(ours.state_dict()) == shapes(theirs.state_dict())


def test_dino_has_the_published_names_and_shapes():
    """Those of facebook/dino-vits16, 21,665,664 numbers, as in a file of its day."""
    config = dict(model_type="vit", hidden_size=384, intermediate_size=1536, num_attention_heads=6, layer_norm_eps=1e-12)
    said = {
        "embeddings.cls_token": [1, 1, 384],
        "embeddings.position_embeddings": [1, 197, 384],
        "embeddings.patch_embeddings.projection.weight": [384, 3, 16, 16],
        "embeddings.patch_embeddings.projection.bias": [384],
        "layernorm.weight": [384],
        "layernorm.bias": [384],
    }
    for i in range(12):
        for name, rows, columns in (
            ("attention.attention.query", 384, 384),
            ("attention.attention.key", 384, 384),
            ("attention.attention.value", 384, 384),
            ("attention.output.dense", 384, 384),
            ("intermediate.dense", 1536, 384),
            ("output.dense", 384, 1536),
        ):
            said |= {f"encoder.layer.{i}.{name}.weight": [rows, columns], f"encoder.layer.{i}.{name}.bias": [rows]}
        for name in ("layernorm_before", "layernorm_after"):
            said |= {f"encoder.layer.{i}.{name}.{kind}": [384] for kind in ("weight", "bias")}
    with torch.device("meta"):
        ours = VisionModel(ViTConfig.from_dict(config)).state_dict()
    assert shapes(ours) == shapes(from_vit({name: torch.empty(shape, device="meta") for name, shape in said.items()}))
    assert sum(x.numel() for x in ours.values()) == 21_665_664


def shapes(state):
    return {name: tuple(x.shape) for name, x in state.items()}


def test_what_files_hold_besides_changes_nothing(clip, dino, copy_of):
    constants = {f"{model}.embeddings.position_ids": torch.arange(5)[None] for model in ("text_model", "vision_model")}
    pooler = {"pooler.dense.weight": torch.ones(32, 32), "pooler.dense.bias": torch.ones(32)}
    for i, (folder, more) in enumerate(((clip[0], constants), (dino[0], pooler))):
        copy = published(copy_of(folder, f"{i}"), lambda state, more=more: state | more)
        assert torch.equal(Encoder(copy).images(pictures()), Encoder(folder).images(pictures()))


def test_how_many_are_looked_at_together_changes_nothing(dino, monkeypatch):
    eyes = Encoder(dino[0])
    whole = eyes.images(pictures())
    monkeypatch.setattr(metrics, "BATCH", 3)
    assert error(eyes.images(pictures()), whole) <= 1e-6


def test_a_single_picture_of_the_class_has_no_diversity(dino, tmp_path):
    (picture, other), path = pictures(SIZES[:2]), tmp_path / "a.png"
    picture.save(path)
    watch = Watch(dino[0], [path], torch.device("cpu"))
    assert watch.measure([picture], [other]).keys() == {"subject_similarity", "class_drift"}
    assert watch.measure([picture], [other, picture]).keys() - {"subject_similarity", "class_drift"} == {"class_diversity"}


def test_a_revision_follows_the_name_on_the_hub(dino, monkeypatch):
    asked = []
    monkeypatch.setattr(metrics, "snapshot", lambda *given: asked.append((given[0], given[2])) or dino[0])
    Encoder("owner/name@refs/pr/1")
    Encoder("owner/name")
    assert asked == [("owner/name", "refs/pr/1"), ("owner/name", None)]


def test_another_kind_than_is_wanted_is_refused(clip, dino):
    for folder, wanted, found in ((clip[0], "vit", "clip"), (dino[0], "clip", "vit")):
        with pytest.raises(UserError, match=f"of type {found}; needed is {wanted}"):
            Encoder(folder, kind=wanted)


@pytest.mark.parametrize(
    "settings, drop, message",
    [
        ({"model_type": "siglip"}, (), "siglip"),
        ({"hidden_act": "swish"}, (), "swish"),
        ({"image_size": [32, 32]}, (), "image_size"),
        ({"num_hidden_layers": 2}, (), "has unexpected encoder.layers.2"),
        ({"image_size": 48}, (), "position_embedding"),
        ({}, {"layernorm.bias"}, "lacks post_layernorm.bias"),
    ],
    ids=["kind", "activation", "side", "depth", "places", "lacking"],
)
def test_another_model_is_refused(dino, copy_of, settings, drop, message):
    with pytest.raises(UserError, match=message):
        Encoder(published(copy_of(dino[0]), drop=drop, **settings))


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors", "merges.txt"])
def test_a_missing_file_is_named(clip, copy_of, name):
    folder = copy_of(clip[0])
    (folder / name).unlink()
    with pytest.raises(UserError, match=name):
        Encoder(folder)


def test_a_damaged_vocabulary_is_refused(clip, copy_of):
    folder = copy_of(clip[0])
    for path in [*folder.glob("vocab.json"), *folder.glob("tokenizer.json")]:
        path.write_text("{")
    with pytest.raises(UserError, match=f"{folder}: vocab.json holds something unexpected"):
        Encoder(folder)


@pytest.mark.parametrize(
    "change, named",
    [({step: False}, step) for step in ("do_resize", "do_rescale", "do_normalize")]
    + [({"size": {"longest_edge": 9}}, "width")],
)
def test_another_preprocessing_is_refused(dino, copy_of, change, named):
    folder = copy_of(dino[0])
    write_json(folder / "preprocessor_config.json", DINO_SEES | change)
    with pytest.raises(UserError, match=named):
        Encoder(folder)


# ---- LPIPS


@pytest.fixture(scope="module")
def lpips_file(tmp_path_factory):
    return random_lpips(tmp_path_factory.mktemp("lpips"))


@pytest.mark.parametrize("height, width", [(64, 64), (97, 130)])
def test_lpips_is_its_formula(lpips_file, height, width):
    a, b = torch.rand((2, 3, 3, height, width), generator=torch.Generator().manual_seed(1)) * 2 - 1
    distance = open_lpips(lpips_file)
    with torch.no_grad():
        found = distance(a, b)
        assert error(found, by_formula(load_file(lpips_file), a, b)) <= 1e-5
        assert (found > 0).all()
        assert torch.allclose(found, distance(b, a))
        assert torch.equal(distance(a, a), torch.zeros(3))


def test_lpips_refuses_another_file(lpips_file, tmp_path):
    state = load_file(lpips_file)
    save_file(state | {"features.0.weight": torch.ones(64, 3, 3, 3)}, tmp_path / "vgg.safetensors")
    save_file({name: x for name, x in state.items() if name.startswith("features")}, tmp_path / "half.safetensors")
    for name, message in (("vgg", "features.0.weight"), ("half", "lacks lin0.model.1.weight")):
        with pytest.raises(UserError, match=message):
            open_lpips(tmp_path / f"{name}.safetensors")


def test_lpips_has_the_published_names():
    names = {f"lin{i}.model.1.weight" for i in range(5)}
    names |= {f"features.{i}.{kind}" for i in (0, 3, 6, 8, 10) for kind in ("weight", "bias")}
    assert LPIPS().state_dict().keys() == names
