"""A hub id is drawn through huggingface_hub and its cache; the hub is a stand-in on loopback."""

import shutil

import pytest
import single_files
import torch
from comparing import differing
from conftest import content, write_json
from hub_standin import ROUTES, Hub, dead_end
from huggingface_hub import HfApi, constants
from safetensors.torch import load_file, save_file

import minibooth
from minibooth.checkpoint.source import CLIP
from minibooth.errors import UserError


def offline(monkeypatch):
    """What HF_HUB_OFFLINE=1 sets at the start of a process."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def with_everything(folder):
    """As the older repositories are: two variants, each also as a pickle, and files for other programs."""
    for weights in [*folder.rglob("*.safetensors")]:
        for name in (f"{weights.stem}.fp16.safetensors", f"{weights.stem}.bin", f"{weights.stem}.fp16.bin"):
            (weights.parent / name).write_bytes(weights.read_bytes())
    for name in ("v1-4.ckpt", "README.md", "model.safetensors"):
        (folder / name).write_bytes(b"not asked for")
    return folder


def test_one_variant_is_drawn_and_then_read_from_the_cache(hub, monkeypatch, sd1, copy_of):
    hub.add("owner/small", with_everything(copy_of(sd1)))
    first = minibooth.load("owner/small", variant="fp16")
    weights = {path for path in hub.downloads if not path.endswith((".json", ".txt"))}
    assert weights == {
        "text_encoder/model.fp16.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    }
    assert hub.downloads - weights == {name for name in content(sd1) if name.endswith((".json", ".txt"))}

    hub.requests.clear()
    minibooth.load("owner/small", variant="fp16")
    assert not hub.downloads
    hub.requests.clear()
    offline(monkeypatch)
    again = minibooth.load("owner/small", variant="fp16")
    assert hub.requests == []
    assert torch.equal(again.unet.conv_out.weight, first.unet.conv_out.weight)
    with pytest.raises(UserError, match="owner/small"):
        minibooth.load("owner/small")  # the other variant was never drawn


def test_what_lacks_the_variant_is_drawn_as_it_is(hub, sd1, copy_of):
    folder = copy_of(sd1)
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.copy(unet, unet.with_suffix(".non_ema.safetensors"))
    hub.add("owner/small", folder)
    minibooth.load("owner/small", variant="non_ema")
    weights = {path for path in hub.downloads if path.endswith("safetensors")}
    others = {"text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"}
    assert weights == {"unet/diffusion_pytorch_model.non_ema.safetensors", *others}


@pytest.mark.parametrize("variant, infix", [(None, ""), ("fp16", ".fp16")])
def test_weights_in_parts_are_drawn(hub, sd1, copy_of, variant, infix):
    folder = copy_of(sd1)
    text = folder / "text_encoder"
    tensors, places = load_file(text / "model.safetensors"), {}
    for i in (0, 1):
        part = {name: tensors[name] for name in sorted(tensors)[i::2]}
        save_file(part, text / f"model{infix}-0000{i + 1}-of-00002.safetensors")
        places |= dict.fromkeys(part, f"model{infix}-0000{i + 1}-of-00002.safetensors")
    write_json(text / f"model.safetensors.index{infix}.json", {"weight_map": places})
    (text / "model.safetensors").unlink()
    hub.add("owner/small", folder)
    assert not differing(minibooth.load("owner/small", variant=variant).text_encoder.state_dict(), tensors)


def test_what_is_there_in_place_of_the_weights_is_named(hub, sd1, copy_of):
    """A variant alone, or a pickle alone; and neither is drawn."""
    half, pickle = "the variants there are fp16: see --variant", "only a pickle (model.bin)"
    for suffix, said in ((".fp16.safetensors", half), (".bin", pickle)):
        folder = copy_of(sd1, suffix)
        for path in [*folder.rglob("*.safetensors")]:
            path.rename(path.with_suffix(suffix))
        hub.add("owner/small", folder, branches=("other",))
        with pytest.raises(UserError) as caught:
            minibooth.load("owner/small", revision="other")
        assert "owner/small/text_encoder" in str(caught.value) and said in str(caught.value)
        assert not [path for path in hub.downloads if path.endswith(("safetensors", "bin"))]


def test_what_one_part_lacks_is_named_and_what_all_lack_is_not_drawn(hub, sd1, copy_of):
    folder = copy_of(sd1)
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    unet.rename(unet.with_suffix(".fp16.safetensors"))
    hub.add("owner/small", folder)
    with pytest.raises(UserError, match="owner/small/text_encoder.*the variants there are without a name"):
        minibooth.load("owner/small", variant="bf16")
    assert not [path for path in hub.downloads if path.endswith("safetensors")]
    with pytest.raises(UserError, match="owner/small/unet.*the variants there are fp16"):
        minibooth.load("owner/small")


def test_what_the_cache_lacks_is_named_where_the_hub_cannot_be_asked(hub, monkeypatch, sd1, copy_of):
    folder = copy_of(sd1)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    hub.add("owner/small", folder)
    with pytest.raises(UserError, match="unet"):
        minibooth.load("owner/small")
    offline(monkeypatch)
    with pytest.raises(UserError, match=r"unet/diffusion_pytorch_model.safetensors is missing$"):
        minibooth.load("owner/small")


def test_an_answer_that_is_not_the_hubs_is_told_in_one_line(hub, sd1, monkeypatch):
    hub.add("owner/small", sd1)
    tree = next(route for route, answer in ROUTES.items() if answer == Hub.tree)
    monkeypatch.setitem(ROUTES, tree, lambda hub, **named: b"<html>")  # as a hotel's network answers
    with pytest.raises(UserError, match="owner/small .*could not be had from the hub"):
        minibooth.load("owner/small")


def test_the_vocabulary_of_single_files_is_drawn_once(hub, tmp_path):
    hub.add(CLIP, single_files.folder("sd1") / "tokenizer")
    path = shutil.copy(single_files.file("sd1"), tmp_path)
    minibooth.load(path)
    assert {"vocab.json", "merges.txt"} <= hub.downloads
    hub.requests.clear()
    minibooth.load(path)
    assert hub.requests == []


def test_the_revision_reaches_the_hub(hub, sd1):
    hub.add("owner/small", sd1, branches=("main", "fp32"))
    minibooth.load("owner/small", revision="fp32")
    assert "GET /api/models/owner/small/revision/fp32" in hub.requests
    with pytest.raises(UserError, match="owner/small"):
        minibooth.load("owner/small", revision="never")


@pytest.mark.parametrize("trouble", [lambda monkeypatch: None, offline, dead_end], ids=["unknown", "offline", "dead"])
def test_what_cannot_be_had_is_told_in_one_line(hub, monkeypatch, trouble):
    trouble(monkeypatch)
    with pytest.raises(UserError) as caught:
        minibooth.load("owner/small")
    assert str(caught.value).startswith("owner/small is no folder here, and could not be had from the hub (")
    assert "\n" not in str(caught.value)


def test_a_push_arrives(hub, sd1):
    """The stand-in's other direction, for the tests of --push_to_hub."""
    api = HfApi(token="hf_none")
    repo = api.create_repo("owner/small", exist_ok=True).repo_id
    done = api.upload_folder(repo_id=repo, folder_path=sd1, commit_message="trained")
    assert done.oid == hub.commit("owner/small")
    assert hub.repositories["owner/small"] == content(sd1)
