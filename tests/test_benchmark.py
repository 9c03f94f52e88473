"""The benchmark measures what it says: the trainer itself beside the reference, each in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import benchmark
import counting
import pytest
from small_run import photographs, tiny

from minibooth import train
from minibooth.dreambooth.optimizer import BLOCK, SMALLEST

LEAN = ["--full_bf16", "--mixed_precision=bf16", "--use_8bit_adam", "--fused_backward_pass", "--max_grad_norm=0"]


def test_a_row(tmp_path):
    for name in ("diffusers", "transformers", "accelerate"):
        pytest.importorskip(name)
    sides = ["reference", "THP_MEM_ALLOC_ENABLE=0 ours --compile off", "floor"]
    flags = ["--model", tiny(), "--resolution", 64, "--steps", 2, "--repeats", 1, "--at_once", 2]
    flags += ["--precision", "fp32", "--device", "cpu"]
    command = [sys.executable, benchmark.__file__, *flags, "--out", tmp_path / "out", "--rows", "prior", "--sides", *sides]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert [line["side"] for line in lines] == sides
    theirs, own, floor = lines
    assert len(own["seconds"]) == len(theirs["seconds"]) == 2
    assert own["pictures"] == floor["pictures"] == 2
    assert min(own["memory"], theirs["memory"]) > 1e8
    assert own["first"] > own["seconds"][0]
    assert floor["seconds"][0] < own["seconds"][0]
    assert done.stdout.splitlines()[-4].startswith("| --- |")


def test_a_failure_is_a_line_and_a_cell(tmp_path):
    line = {"row": "unet", "precision": "fp32", "side": "ours", "error": "out of memory"}
    assert benchmark.table([line]).splitlines()[-1] == "| unet | fp32 | ours | out of memory |"


def test_a_mistake_is_one_line_before_anything_is_measured():
    command = [sys.executable, benchmark.__file__, "--model", str(tiny()), "--resolution", "64", "--rows", "unet", "foo"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout and done.stderr.startswith("benchmark: error: foo by reference")


def test_a_folder_of_configurations_is_filled(tmp_path):
    bare = tmp_path / "bare"
    for path in tiny().rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            copy = bare / path.relative_to(tiny())
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    filled = counting.filled(bare, tmp_path)
    assert benchmark.minibooth.load(filled).generate(["a photo of a dog"], steps=1, seed=0)
    assert counting.filled(tiny(), tmp_path) == tiny()


def held(folder: Path, *more: str) -> dict[str, float]:
    where = [f"--instance_data_dir={photographs(folder)}", "--resolution=64", "--train_batch_size=8"]
    return counting.memory(train.parse([f"--pretrained_model_name_or_path={tiny()}", *where, *more]))


def test_memory_is_counted(tmp_path):
    """Four bytes a parameter in all, where every flag is given; activations shrink when they are computed again."""
    lean, less = held(tmp_path, *LEAN), held(tmp_path, *LEAN, "--gradient_checkpointing")
    sizes = [
        p.numel() for p in counting.networks(train.parse([f"--pretrained_model_name_or_path={tiny()}"]))["unet"].parameters()
    ]
    assert lean["weights"] * 2**30 == 2 * sum(sizes)
    large = [size for size in sizes if size >= SMALLEST and size % BLOCK == 0]
    small = sum(sizes) - sum(large)
    assert lean["moments"] * 2**30 == pytest.approx(sum(large) * (2 + 8 / BLOCK) + 8 * small + 4 * len(sizes))
    assert less["weights"] == lean["weights"] and less["besides"] < 0.8 * lean["besides"]
    usual, lora = held(tmp_path), held(tmp_path, "--rank=2")
    assert usual["weights"] * 2**30 == 4 * sum(sizes) and usual["besides"] * 2**30 > 4 * sum(sizes)  # gradients among it
    assert 2 * sum(sizes) < lora["weights"] * 2**30 < 2.5 * sum(sizes) and lora["peak"] < 0.6 * usual["peak"]
