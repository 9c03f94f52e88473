"""Two processes do what one does with twice the batch: torchrun's, with gloo on the CPU.

Starting them takes longer than a run, so this file is also what they start: command lines, one after another.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from comparing import weights
from PIL import Image, ImageChops
from safetensors.torch import load_file
from small_run import flags, launch, metrics, run, small, train, wait_for_steps

from minibooth.dreambooth import parallel, prior, stages
from minibooth.dreambooth.settings import Settings
from minibooth.dreambooth.trainer import Trainer
from minibooth.errors import UserError

WAYS = ("ddp", "fsdp")
CASES = {
    "accumulation": {"gradient_accumulation_steps": 2, "max_grad_norm": 1e-2, "snr_gamma": 5.0, "random_flip": True},
    "prior and text encoder": {
        "with_prior_preservation": True, "class_prompt": "a photo of dog", "num_class_images": 7, "train_text_encoder": True,
        "gradient_checkpointing": True, "validation_prompt": "a sks dog", "validation_steps": 2, "num_validation_images": 1,
    },
    "LoRA": {"rank": 2, "train_text_encoder": True},
    "XL": {"train_text_encoder": True},
}  # fmt: skip
RUNS = [(way, name) for way in WAYS for name in CASES]
FEW = (stages.VALIDATION, "steps", 2), (prior.DRAWING, "steps", 2)


def torchrun(*words: object) -> subprocess.Popen:
    """Two processes of it."""
    return launch("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *words)


def start(folder: Path, runs: list[Settings], dies: int | None = None) -> tuple[int, str, str]:
    """Runs of two processes, the second of which `dies` when it begins that step; returns status, stdout and stderr."""
    (folder / "runs.json").write_text(json.dumps([[flags(settings) for settings in runs], dies]))
    with torchrun(__file__, folder) as process:
        out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def rank(folder: Path) -> None:
    """One of the processes; leaves which samples it took and which pictures it drew, a list for each run."""
    runs, dies = json.loads((folder / "runs.json").read_text())
    number, seen = int(os.environ["RANK"]), []
    sample, step, save_png = Trainer.sample, Trainer.step, prior.save_png

    def recorded(self, latents, n):
        x = sample(self, latents, n)
        seen.append([f"{latents.name} {n}", x[1].flatten()[:4].tolist()])
        return x

    def drawn(picture, path, about):
        seen.append(["drawn", path.name])
        save_png(picture, path, about)

    def mortal(self, n):
        if number == 1 and n == dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, n)

    torch.distributed.init_process_group("gloo")
    parallel.dist.init_process_group = parallel.dist.destroy_process_group = lambda *args, **how: None  # once for all runs
    Trainer.sample, Trainer.step, prior.save_png = recorded, mortal, drawn
    for table, key, value in FEW:
        table[key] = value
    found = []
    for words in runs:
        if status := run(words):
            sys.exit(status)
        found.append([*seen])
        seen.clear()
    (folder / f"rank-{number}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def done(tmp_path_factory, sdxl) -> tuple[Path, str, list]:
    """The folder of all runs: of one process (one-NAME), of two (WAY-NAME), and of two that go on from where one was at step 2
    (WAY-resumed). Besides, what was printed, and what each rank did."""
    folder = tmp_path_factory.mktemp("parallel")

    def settings(output: str, name: str, **changes) -> Settings:
        usual = dict(max_train_steps=4, checkpointing_steps=2, output_dir=str(folder / output))
        return small(folder, sdxl if name == "XL" else None, **usual | CASES[name] | changes)

    with pytest.MonkeyPatch.context() as patch:
        for table, key, value in FEW:
            patch.setitem(table, key, value)
        for name in CASES:
            train(settings(f"one-{name}", name, train_batch_size=4))
        many = [settings(f"{way}-{name}", name, parallel=way) for way, name in RUNS]
        for way in WAYS:
            shutil.copytree(folder / "one-prior and text encoder", folder / f"{way}-resumed")
            shutil.rmtree(folder / f"{way}-resumed" / "checkpoint-4")
            changes = dict(resume_from_checkpoint="checkpoint-2", seed=None, parallel=way)
            many.append(settings(f"{way}-resumed", "prior and text encoder", **changes))
        status, out, err = start(folder, many)
    assert status == 0, err
    return folder, out, [json.loads((folder / f"rank-{number}.json").read_text()) for number in range(2)]


def losses(output: Path) -> list[float]:
    return [line["loss"] for line in metrics(output)]


def learnt(output: Path) -> dict[str, torch.Tensor]:
    """What a run leaves."""
    lora = output / "pytorch_lora_weights.safetensors"
    return load_file(lora) if lora.exists() else weights(output)


def assert_same(one: Path, other: Path) -> None:
    """But for the order of sums: Adam's first steps make a little of nothing, where a gradient is nearly 0."""
    assert losses(other) == pytest.approx(losses(one), rel=1e-5)
    expected, found = learnt(one), learnt(other)
    assert expected.keys() == found.keys()
    assert all(found[name].shape == x.shape and found[name].dtype == x.dtype for name, x in expected.items())
    assert sum((found[name] - x).abs().sum() for name, x in expected.items()) < 1e-5 * sum(
        x.abs().sum() for x in expected.values()
    )


@pytest.mark.parametrize("way, name", [*RUNS, *((way, "resumed") for way in WAYS)])
def test_two_processes_repeat_one_with_twice_the_batch(way, name, done):
    """Also where they go on from its checkpoint."""
    folder, *_ = done
    assert_same(folder / f"one-{name if name in CASES else 'prior and text encoder'}", folder / f"{way}-{name}")


@pytest.mark.parametrize("way, name", [("ddp", "accumulation"), ("fsdp", "prior and text encoder"), ("fsdp", "LoRA")])
def test_one_process_goes_on_from_a_checkpoint_of_two(way, name, done, monkeypatch):
    folder, *_ = done
    for table, key, value in FEW:
        monkeypatch.setitem(table, key, value)
    output = Path(shutil.copytree(folder / f"{way}-{name}", folder / f"{way}-{name}-alone"))
    changes = dict(resume_from_checkpoint="checkpoint-2", seed=None, train_batch_size=4, output_dir=str(output))
    shutil.rmtree(output / "checkpoint-4")
    (output / "samples" / "step-4.png").unlink(missing_ok=True)
    train(small(folder, **CASES[name] | changes | {"max_train_steps": 4}))
    assert_same(folder / f"one-{name}", output)


def test_each_process_has_its_own_samples_and_noise(done):
    _, _, ranks = done
    for one, other in zip(*ranks, strict=True):
        one, other = ([each for each in did if each[0] != "drawn"] for did in (one, other))
        assert len(one) == len(other) > 0
        assert len({name for name, _ in one + other}) == len(one + other)
        assert len({tuple(noise) for _, noise in one + other}) == len(one + other)


def test_each_process_draws_its_share_of_the_class_pictures(done):
    folder, _, ranks = done
    shares = [[name for kind, name in rank[RUNS.index(("ddp", "prior and text encoder"))] if kind == "drawn"] for rank in ranks]
    assert shares == [[f"{i:05d}.png" for i in range(first, 7, 2)] for first in range(2)]
    for way in WAYS:
        drawn = sorted((folder / f"{way}-prior and text encoder" / "class").glob("*/*.png"))
        expected = sorted((folder / "one-prior and text encoder" / "class").glob("*/*.png"))
        assert [path.name for path in drawn] == [path.name for path in expected] and len(drawn) == 7
        for path, other in zip(drawn, expected, strict=True):
            difference = ImageChops.difference(Image.open(path), Image.open(other))
            assert max(high for _, high in difference.getextrema()) <= 1


def test_only_one_process_prints_and_writes(done):
    folder, out, _ = done
    assert out.count("draw with it:") == out.count("3 pictures") == len(RUNS) + len(WAYS)
    assert out.count("batch 2 + 2 in each of 2 processes") == 2 * len(WAYS)
    output = folder / "fsdp-prior and text encoder"
    assert [line["step"] for line in metrics(output)] == [1, 2, 3, 4]
    assert json.loads((output / "run.json").read_text())["command"].startswith("torchrun --nproc-per-node 2 -m minibooth.train")
    one = {
        path.relative_to(folder / "one-prior and text encoder") for path in (folder / "one-prior and text encoder").rglob("*")
    }
    assert {path.relative_to(output) for path in output.rglob("*")} == one


# ---- stopped


def test_a_process_that_dies_ends_the_others_and_leaves_its_checkpoint(tmp_path):
    settings = small(tmp_path, checkpointing_steps=2, max_train_steps=50)
    status, _, err = start(tmp_path, [settings], dies=3)
    assert status != 0
    output = Path(settings.output_dir)
    (message,) = [line for line in err.splitlines() if "another process of the run has ended" in line]
    assert "--resume_from_checkpoint latest" in message and f"{output / 'checkpoint-2'} is whole" in message
    assert len(metrics(output)) == 3 and not (output / "unet").exists()
    changes = dict(train_batch_size=4, max_train_steps=4)
    train(small(tmp_path, resume_from_checkpoint="latest", **changes))
    assert_same(train(small(tmp_path, output_dir=str(tmp_path / "whole"), **changes)), output)


def test_ctrl_c_ends_all_with_one_checkpoint(tmp_path):
    settings = small(tmp_path, parallel="fsdp", max_train_steps=1000)
    output = tmp_path / "output"
    with torchrun("-m", "minibooth.train", *flags(settings)) as process:
        wait_for_steps(process, output, 2)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    steps = len(metrics(output))
    (checkpoint,) = output.glob("checkpoint-*")
    assert checkpoint.name == f"checkpoint-{steps}"
    assert f"--resume_from_checkpoint latest (step {steps})" in err
    changes = dict(train_batch_size=4, max_train_steps=steps + 1, parallel=None)
    train(small(tmp_path, resume_from_checkpoint="latest", **changes))
    assert len(metrics(output)) == steps + 1


def test_what_is_no_other_processs_fault_keeps_its_traceback(tmp_path, monkeypatch):
    """And where one has ended before there was a checkpoint, that is said."""
    monkeypatch.setattr(parallel.signal, "signal", lambda number, handler: None)
    ranks = object.__new__(parallel.Replicas)
    with pytest.raises(RuntimeError, match="^shapes$"), ranks.guard(str(tmp_path)):
        raise RuntimeError("shapes")
    with pytest.raises(UserError, match=r"latest \(no checkpoint was written yet\); gloo"), ranks.guard(str(tmp_path)):
        raise RuntimeError("gloo: connection closed by peer")


# ---- refused


@pytest.mark.parametrize(
    "processes, changes, problem",
    [
        (None, {"parallel": "fsdp"}, "--parallel fsdp needs many: torchrun"),
        (2, {"fused_backward_pass": True, "max_grad_norm": 0.0}, "--fused_backward_pass .* leave it out"),
        (2, {"use_8bit_adam": True, "parallel": "fsdp"}, "--use_8bit_adam .* take --parallel ddp"),
        (2, {"full_bf16": True, "mixed_precision": "bf16", "parallel": "fsdp"}, "--full_bf16 .* take --parallel ddp"),
    ],
)
def test_what_many_cannot_do_is_refused_first(processes, changes, problem, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if processes:
        for name, value in {"WORLD_SIZE": processes, "RANK": 0, "LOCAL_RANK": 0, "MASTER_PORT": 1}.items():
            monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match=problem), parallel.start(Settings(**changes), torch.device("cpu")):
        pass


@pytest.mark.parametrize("name", ["cuda", "cuda:1", "cpu"])
def test_alone_a_gpu_that_is_named_is_made_the_current_one(name, monkeypatch):
    """On which a CUDA graph is recorded: on another it would be empty, and every replay the same."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    with parallel.start(Settings(), torch.device(name)) as ranks:
        assert ranks.device == torch.device(name)
    assert chosen == [torch.device(name)] * (name == "cuda:1")


@pytest.mark.parametrize("gpus, nccl, backend", [(2, True, "nccl"), (2, False, "gloo"), (1, True, None)])
def test_each_of_many_takes_the_gpu_of_its_number(gpus, nccl, backend, monkeypatch):
    for name, value in {"WORLD_SIZE": 2, "RANK": 1, "LOCAL_RANK": 1, "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    begun, chosen = [], []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    group = {"is_nccl_available": lambda: nccl, "init_process_group": lambda backend, timeout: begun.append(backend)}
    group |= {"get_rank": lambda: 0, "get_world_size": lambda: 2, "destroy_process_group": begun.clear}
    for name, function in group.items():
        monkeypatch.setattr(parallel.dist, name, function)
    if not backend:
        with pytest.raises(UserError, match="process 1 has no GPU: --nproc-per-node 1 is the most"):
            parallel.start(Settings(), torch.device("cuda")).__enter__()
        return
    with parallel.start(Settings(), torch.device("cuda")) as ranks:
        assert ranks.device == torch.device("cuda", 1) and chosen == [ranks.device] and begun == [backend]
    assert not begun
    with pytest.raises(UserError, match="mps is one device: add --device cpu"):
        parallel.start(Settings(), torch.device("mps")).__enter__()


@pytest.mark.parametrize("value", ["2", "two"])
def test_variables_that_torchrun_did_not_set_are_named(value, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", value)
    with pytest.raises(UserError, match="'RANK': ''.* start with torchrun"), parallel.start(Settings(), torch.device("cpu")):
        pass


if __name__ == "__main__":
    rank(Path(sys.argv[1]))
