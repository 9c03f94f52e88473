"""python -m minibooth.convert: any layout and precision into any other, nothing lost, one tensor in memory at a time."""

import json
import shutil
import sys

import pytest
import torch
from comparing import differing, weights
from safetensors.torch import load_file
from single_files import change, file, folder
from small_run import launch

from minibooth import command, convert
from minibooth.checkpoint import files

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def run(*words):
    """The command in this process; returns its exit status."""
    with pytest.raises(SystemExit) as end:
        command.run(convert.main, ["convert.py", *map(str, words)])
    return end.value.code


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl", "x4"])
def test_folder_file_folder_is_the_identity(kind, tmp_path):
    assert run(folder(kind), tmp_path / "x.safetensors") == 0
    assert run(tmp_path / "x.safetensors", tmp_path / "folder", "--tokenizer", folder(kind)) == 0
    assert not differing(weights(tmp_path / "folder"), weights(folder(kind)))
    assert run(tmp_path / "folder", tmp_path / "y.safetensors") == 0
    assert not differing(load_file(tmp_path / "y.safetensors"), load_file(tmp_path / "x.safetensors"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", [folder, file])
@pytest.mark.parametrize("target", ["target", "target.safetensors"])
def test_every_float_is_written_in_the_dtype_that_is_asked_for(source, target, dtype, tmp_path):
    assert run(source("sd2"), tmp_path / target, "--dtype", dtype) == 0
    written, expected = tmp_path / target, folder("sd2") if target == "target" else file("sd2")
    read = weights if target == "target" else load_file
    assert not differing(read(written), {name: x.to(DTYPES[dtype]) for name, x in read(expected).items()})


def test_integers_stay_what_they_are(tmp_path):
    ids = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    path = change(file("sd1"), tmp_path / "x.safetensors", lambda x: x | {ids: torch.arange(77)[None]})
    assert run(path, tmp_path / "y.safetensors", "--dtype=fp16", "--tokenizer", folder("sd1")) == 0
    written = load_file(tmp_path / "y.safetensors")
    assert torch.equal(written[ids], torch.arange(77)[None])
    assert {x.dtype for x in written.values()} == {torch.float16, torch.int64}


def test_a_folder_keeps_its_small_files(tmp_path):
    assert run(folder("sdxl"), tmp_path / "copy", "--dtype=bf16") == 0
    small = [path.relative_to(folder("sdxl")) for path in folder("sdxl").rglob("*") if path.suffix in (".json", ".txt")]
    assert all((tmp_path / "copy" / path).read_bytes() == (folder("sdxl") / path).read_bytes() for path in small)


def test_a_variant_is_read(tmp_path):
    half = shutil.copytree(folder("sd1"), tmp_path / "half")
    for path in list(half.rglob("*.safetensors")):
        path.rename(path.with_suffix(".fp16.safetensors"))
    assert run(half, tmp_path / "x.safetensors") == 2
    assert run(half, tmp_path / "x.safetensors", "--variant", "fp16") == 0
    assert not differing(load_file(tmp_path / "x.safetensors"), load_file(file("sd1")))


def test_the_average_and_the_prediction_type_are_the_users(tmp_path):
    def average(tensors):
        names = [name for name in tensors if name.startswith("model.diffusion_model.")]
        return tensors | {f"model_ema.{name[6:].replace('.', '')}": tensors[name] + 1 for name in names}

    path = change(file("sd2"), tmp_path / "x.safetensors", average)
    words = "--tokenizer", folder("sd2"), "--ema", "--prediction_type", "v_prediction"
    assert run(path, tmp_path / "folder", *words) == 0
    expected = {name: x + name.startswith("unet/") for name, x in weights(folder("sd2")).items()}
    assert not differing(weights(tmp_path / "folder"), expected)
    schedule = json.loads((tmp_path / "folder" / "scheduler" / "scheduler_config.json").read_text())
    assert schedule["prediction_type"] == "v_prediction"
    assert run(folder("sd1"), tmp_path / "v", "--prediction-type=v_prediction") == 0
    schedule = json.loads((tmp_path / "v" / "scheduler" / "scheduler_config.json").read_text())
    assert schedule["prediction_type"] == "v_prediction"


# ---- refusals


@pytest.mark.parametrize("target", ["there.safetensors", "there", "link"])
def test_what_is_there_is_never_overwritten(target, tmp_path, capsys):
    path = tmp_path / target
    if target == "link":
        path.symlink_to("nowhere")
    else:
        path.mkdir() if target == "there" else path.write_bytes(b"precious")
    assert run(folder("sd1"), path) == 2
    assert f"{path} is there already" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == [target]
    assert target != "there.safetensors" or path.read_bytes() == b"precious"


@pytest.mark.parametrize(
    "words, reason",
    [
        (["nowhere", "x"], "nowhere is missing"),
        (["nowhere", "a/x.ckpt"], "a single file is written as a/x.safetensors, not as x.ckpt"),
        ([file("sd1"), "x.CKPT"], "a single file is written as x.safetensors, not as x.CKPT"),
        ([file("sd1"), "x.SAFETENSORS"], "a single file is written as x.safetensors, not as x.SAFETENSORS"),
        ([file("sd1"), ""], "name a file or a folder"),
        ([file("sd1"), f"{file('sd1')}/x.safetensors"], "sd1.safetensors is no folder that can be written"),
        ([file("sd1"), "x" * 300], "File name too long: " + "x" * 300),
        ([file("sd1"), "x", "--dtype=fp8"], "fp8"),
        ([file("sd1"), "x", "--ema"], "no EMA weights"),
        ([file("sd1")], "DST"),
    ],
    ids=["source", "kind", "pickle", "capitals", "empty", "in a file", "long", "dtype", "ema", "target"],
)
def test_mistakes_end_in_one_line_and_leave_nothing(words, reason, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*words) == 2
    said = capsys.readouterr().err
    assert reason in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["y", "y.safetensors"])
def test_a_file_that_lacks_a_tensor_is_refused_before_anything_is_written(target, tmp_path, capsys):
    name = "first_stage_model.decoder.conv_in.bias"
    path = change(file("sd1"), tmp_path / "x" / "x.safetensors", lambda x: {key: y for key, y in x.items() if key != name})
    assert run(path, tmp_path / target, "--tokenizer", folder("sd1")) == 2
    assert "vae lacks decoder.conv_in.bias" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch, capsys):
    def full(path, *arguments):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_weights", full)
    assert run(folder("sd1"), tmp_path / "x") == 2
    assert "No space left" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_schedule_keeps_its_precision(tmp_path):
    """A1111 draws by alphas_cumprod of a file, the first of which are 1 in bf16: its last sigma would be no number."""
    alphas = torch.linspace(0.9995, 0.005, 1000)
    path = change(file("sd1"), tmp_path / "x.safetensors", lambda tensors: tensors | {"alphas_cumprod": alphas})
    assert run(path, tmp_path / "y.safetensors", "--dtype=bf16", "--tokenizer", folder("sd1")) == 0
    tensors = load_file(tmp_path / "y.safetensors")
    assert torch.equal(tensors.pop("alphas_cumprod"), alphas)
    assert {x.dtype for x in tensors.values()} == {torch.bfloat16}


# ---- memory

MEASURE = """
import resource, sys
from minibooth.convert import main
main(sys.argv[1:3])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
main(sys.argv[3:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has another unit")
def test_memory_does_not_grow_with_the_file(tmp_path):
    """320 MB of holes, in tensors of 8 MB, are copied in little more than the part of a file that is mapped at a time."""
    small, large = tmp_path / "small.safetensors", tmp_path / "large.safetensors"
    shutil.copy(file("sd1"), small)
    shutil.copytree(file("sd1").parent / "tokenizer", tmp_path / "tokenizer")
    data = small.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    end, size = len(data) - 8 - length, 2**23
    for i in range(40):
        header[f"low_scale_model.{i}"] = {
            "dtype": "F32",
            "shape": [size // 4],
            "data_offsets": [end + i * size, end + (i + 1) * size],
        }
    text = json.dumps(header).encode()
    with open(large, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text + data[8 + length :])
        stream.truncate(8 + len(text) + end + 40 * size)
    words = [small, tmp_path / "a.safetensors", large, tmp_path / "b.safetensors"]
    with launch("-c", MEASURE, *words) as process:
        out, err = process.communicate()
    assert process.returncode == 0, err
    assert int(out.split()[-1]) < 100 * 1024  # KB
    assert (tmp_path / "b.safetensors").stat().st_size > 40 * size
