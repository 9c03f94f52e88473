"""Weights come from whole safetensors files inside their folder alone, and are written whole or not at all."""

import errno
import json
import mmap
import os
import pickle
import weakref
from pathlib import Path

import pytest
import torch
from comparing import differing
from safetensors.torch import load_file, save_file

from minibooth.checkpoint import files
from minibooth.errors import UserError

TENSORS = {"a.weight": torch.arange(12.0).reshape(3, 4), "b": torch.tensor([1.5]).half(), "c": torch.ones(2).bfloat16()}


def shard(folder, tensors=TENSORS, infix=""):
    """A file for each tensor, and their index."""
    names = {name: f"model{infix}-{i + 1:05d}-of-{len(tensors):05d}.safetensors" for i, name in enumerate(tensors)}
    for name, file in names.items():
        save_file({name: tensors[name]}, folder / file)
    index = folder / f"model.safetensors.index{infix}.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": names}))
    return index


def refusal(folder, *arguments):
    with pytest.raises(UserError) as caught:
        files.weights_of(folder, *arguments)
    return str(caught.value)


# ---- reading


def test_tensors_come_back_in_the_dtype_of_the_file(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    assert not differing(files.weights_of(tmp_path, "model"), TENSORS)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_are_one_mapping(tmp_path, variant):
    shard(tmp_path, infix=f".{variant}" if variant else "")
    tensors = files.weights_of(tmp_path, "model", variant)
    assert not differing(tensors, TENSORS)
    assert len(tensors) == 3


def test_a_variant_is_read_only_where_it_is_asked_for(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "model.fp16.safetensors")
    assert files.weights_of(tmp_path, "model")["a"] == 0
    assert files.weights_of(tmp_path, "model", "fp16")["a"] == 1


def test_weights_can_be_read_after_their_file_is_gone(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    tensors = files.weights_of(tmp_path, "model")
    (tmp_path / "model.safetensors").unlink()
    assert not differing(tensors, TENSORS)


def test_a_file_is_mapped_in_parts_each_as_long_as_a_tensor_of_it_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(files.Tensors, "PART", mmap.ALLOCATIONGRANULARITY)
    many = {f"{i}": torch.full((i, mmap.ALLOCATIONGRANULARITY // 8), i) for i in range(1, 5)}  # int64: i parts long
    many |= {"none": torch.empty(0, 3), "one": torch.tensor(2.0)}
    save_file(many, tmp_path / "model.safetensors")

    def mapped():
        """How often Linux has the file in this process's memory."""
        maps = Path("/proc/self/maps")
        return maps.read_text().count(str(tmp_path)) if maps.exists() else None

    tensors = files.weights_of(tmp_path, "model")
    assert mapped() in (0, None)
    held = {name: tensors[name] for name in tensors}
    assert not differing(held, many)
    assert mapped() in (5, None)  # one for each that holds something
    held["1"].zero_()
    del held
    assert mapped() in (0, None)
    assert not differing(tensors, many)


def test_a_file_may_lie_at_any_byte(tmp_path):
    header = b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,12]},"__metadata__":{"format":"pt"}}'
    for pad in range(4):
        text, values = header + b" " * pad, torch.tensor([1.0, 2.0, 3.0])
        (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + values.numpy().tobytes())
        tensors = files.weights_of(tmp_path, "model")
        assert torch.equal(tensors["a"] * 2, values * 2)
        assert tensors.metadata == {"format": "pt"}


def test_the_variant_that_is_there_is_named(tmp_path):
    save_file(TENSORS, tmp_path / "model.fp16.safetensors")
    assert "the variants there are fp16: see --variant" in refusal(tmp_path, "model")
    shard(tmp_path, infix=".bf16")
    assert "the variants there are bf16, fp16: see --variant" in refusal(tmp_path, "model")


def test_a_variant_that_is_not_there_is_refused(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    message = refusal(tmp_path, "model", "fp16")
    assert "model.fp16.safetensors is missing; the variants there are without a name" in message


def test_a_missing_shard_is_named(tmp_path):
    shard(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors is missing" in refusal(tmp_path, "model")


@pytest.mark.parametrize("name", ["../outside.safetensors", "{tmp}/outside.safetensors", "sub/../../x.safetensors", ".."])
def test_an_index_cannot_point_outside_its_folder(tmp_path, name):
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file(TENSORS, tmp_path / "outside.safetensors")
    weight_map = {"a.weight": name.format(tmp=tmp_path)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "points outside its folder" in refusal(folder, "model")


@pytest.mark.parametrize("content", [{}, {"weight_map": {}}, {"weight_map": ["a"]}, {"weight_map": {"a": 1}}])
def test_an_index_that_lists_nothing_is_refused(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(content))
    assert "model.safetensors.index.json" in refusal(tmp_path, "model")


@pytest.mark.parametrize("kept", [0, 4, 60, -1])
def test_a_truncated_file_is_named(tmp_path, kept):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    path.write_bytes(path.read_bytes()[:kept])
    assert f"{path} is not a whole safetensors file" in refusal(tmp_path, "model")


def test_a_file_that_is_not_there_or_cannot_be_read_is_not_called_damaged(tmp_path):
    for path, reason in ((tmp_path / "gone.safetensors", "No such file"), (tmp_path, "")):
        with pytest.raises(UserError, match=f"{path} cannot be read: .*{reason}"):
            files.Tensors([path])


def test_the_file_of_an_unknown_dtype_is_named(tmp_path):
    save_file(TENSORS, tmp_path / "one.safetensors")
    header = b'{"d":{"dtype":"F8_E8M0","shape":[1],"data_offsets":[0,1]}}'
    (tmp_path / "two.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(UserError, match=r"two.safetensors: d is stored as F8_E8M0; supported: F64"):
        files.Tensors([tmp_path / "one.safetensors", tmp_path / "two.safetensors"])


@pytest.mark.parametrize("entry", [
    '{"dtype":"F32","shape":[0,4611686018427387904,8],"data_offsets":[0,0]}',
    '{"dtype":"F32","shape":[9223372036854775808,0],"data_offsets":[0,0]}', '["F32",[1],[0,4]]',
])  # fmt: skip
def test_the_file_of_an_odd_header_is_named(entry, tmp_path):
    """Which safetensors' own reader takes."""
    header = f'{{"a":{entry}}}'.encode()
    (tmp_path / "odd.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4 if "4]" in entry else 0))
    with pytest.raises(UserError, match="odd.safetensors"):
        files.Tensors([tmp_path / "odd.safetensors"])


class Trap:
    def __reduce__(self):
        return (os.mkdir, ("sprung",))


@pytest.mark.parametrize("name", ["model.bin", "model.ckpt", "model.fp16.bin", "model-00001-of-00001.bin"])
def test_a_pickle_is_refused_and_never_opened(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "text_encoder"
    folder.mkdir()
    (folder / name).write_bytes(pickle.dumps(Trap()))
    message = refusal(folder, "model")
    assert "pickle" in message and name in message and "convert it to safetensors" in message
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "text, reason",
    [("{", "JSONDecodeError"), ("[]", "'list' object is not a mapping"), ("[" * 10**5, "RecursionError"), (None, "is missing")],
)
def test_broken_json_is_named(tmp_path, text, reason):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=reason) as caught:
        files.read_json(path)
    assert str(path) in str(caught.value)


# ---- writing


def test_what_is_written_is_what_is_read(tmp_path):
    files.write_weights(tmp_path / "new" / "model.safetensors", TENSORS)
    assert not differing(files.weights_of(tmp_path / "new", "model"), TENSORS)
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "model.safetensors"]


def test_tensors_are_written_in_the_dtype_of_others(tmp_path):
    trained = {name: tensor.float() + 1 for name, tensor in TENSORS.items()}
    files.write_weights(tmp_path / "model.safetensors", trained, like=TENSORS)
    written = files.weights_of(tmp_path, "model")
    assert not differing(written, {name: (tensor + 1).to(tensor.dtype) for name, tensor in TENSORS.items()})


def test_a_tensor_that_is_a_view_is_written(tmp_path):
    files.write_weights(tmp_path / "model.safetensors", {"t": TENSORS["a.weight"].T})
    assert torch.equal(files.weights_of(tmp_path, "model")["t"], TENSORS["a.weight"].T)


def test_a_hundred_tensors_take_the_memory_of_one(tmp_path):
    """The writer asks for each tensor once, and lets go of it before the next."""
    alive, seen = [], []

    def made(i):
        def make(_):
            assert not any(ref() is not None for ref in alive)
            tensor = torch.full((4,), float(i))
            alive.append(weakref.ref(tensor))
            seen.append(i)
            return tensor

        return make

    view = files.View({}, {f"{i}": made(i) for i in range(100)})
    shapes = dict.fromkeys(view, torch.empty(4, device="meta"))
    view.__class__ = type("Counted", (files.View,), {"meta": shapes})
    files.write_weights(tmp_path / "x.safetensors", view)
    assert sorted(seen) == list(range(100))
    assert all((x == int(name)).all() for name, x in load_file(tmp_path / "x.safetensors").items())


def test_safetensors_own_writer_and_ours_agree(tmp_path):
    kinds = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
    tensors = {f"{dtype}": torch.arange(3).to(dtype) for dtype in kinds} | {"0": torch.tensor(1.5), "none": torch.empty(0, 3)}
    save_file(tensors, tmp_path / "theirs.safetensors")
    files.write_weights(tmp_path / "ours.safetensors", tensors)
    assert not differing(load_file(tmp_path / "ours.safetensors"), load_file(tmp_path / "theirs.safetensors"))


def entries(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def lay(folder, content):
    for name, text in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


OLD = {"unet/config": "old", "unet/fp16": "old", "README": "old", "samples/1": "old", "index": "old"}
NEW = {"unet/config": "new", "vae/config": "new", "index": "new"}


def test_a_folder_appears_under_its_name_when_it_is_whole(tmp_path):
    with files.replacing(tmp_path / "a" / "b") as scratch:
        lay(scratch, NEW)
        assert not (tmp_path / "a" / "b").exists()
    assert entries(tmp_path) == {f"a/b/{name}": text for name, text in NEW.items()}


def test_a_folder_is_replaced_as_a_whole_or_merged(tmp_path):
    for merge, expected in ((False, NEW), (True, NEW | {"README": "old", "samples/1": "old"})):
        lay(tmp_path / "x", OLD)
        with files.replacing(tmp_path / "x", merge) as scratch:
            lay(scratch, NEW)
        assert entries(tmp_path / "x") == expected
        assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_a_crash_while_writing_leaves_the_old_as_it_was(tmp_path, merge, kind):
    lay(tmp_path / "x", OLD)
    with pytest.raises(kind), files.replacing(tmp_path / "x", merge) as scratch:
        lay(scratch, NEW)
        raise kind
    assert entries(tmp_path) == {f"x/{name}": text for name, text in OLD.items()}


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("failing", range(3))
def test_a_failure_while_moving_leaves_the_old_as_it_was(tmp_path, monkeypatch, merge, failing):
    lay(tmp_path / "x", OLD)
    calls, replace = [], os.replace

    def fail(*arguments):
        calls.append(arguments)
        if len(calls) == 1 + (failing if merge else 0):
            raise OSError(errno.ENOSPC, "no space left on device")
        replace(*arguments)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"), files.replacing(tmp_path / "x", merge) as scratch:
        lay(scratch, NEW)
    assert entries(tmp_path) == {f"x/{name}": text for name, text in OLD.items()}


# ---- the fingerprint


def test_a_fingerprint_tells_weights_apart():
    def shifted(name, by):
        return TENSORS | {name: TENSORS[name] + by}

    others = [
        shifted("a.weight", 1),
        shifted("c", 1),
        TENSORS | {"d": torch.zeros(1)},
        {"a.weight": TENSORS["a.weight"]},
        {"long": torch.zeros(5000)},
        {"long": torch.zeros(5000).index_fill(0, torch.arange(2500, 5000), 1)},
    ]
    prints = {files.hash_of(tensors) for tensors in (TENSORS, *others)}
    assert len(prints) == 7
    reordered = dict(reversed([(name, tensor.clone()) for name, tensor in TENSORS.items()]))
    assert files.hash_of(reordered) == files.hash_of(TENSORS)
