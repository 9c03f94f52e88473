"""Ours beside diffusers' modules as its train_dreambooth.py drives them: seconds, memory, pictures; and the floor.

    python scripts/benchmark.py --model FOLDER --rows unet prior text lora draw load --precision fp32 bf16 --out figures.jsonl

A row is one of ROWS; a side is `ours`, `reference` (batches read and encoded by VAE and text encoder at every step, accelerate,
torch.optim.AdamW) or `floor` (the step's operations and bytes at the rates that the machine is measured to have). Either may
carry flags of minibooth.train, and a side variables of the environment before its name:

    --rows "unet --train_batch_size 8" --sides reference "THP_MEM_ALLOC_ENABLE=0 ours --full_bf16 --compile off" floor

Every measurement is a process of its own, and the sides take turns, --repeats times. --at_once N sets N up side by side
(compiling is most of the time); they are still measured one by one. Each leaves a line of JSON in --out as soon as it is
done; the table has medians over all. A folder of configurations without weights gets random ones.

On a GPU; SD1 and SD2 are folders of models. Compiled sides take five minutes to be ready, so they have a call of their own:

    python scripts/benchmark.py --model SD1 --precision bf16 --steps 15 --repeats 1 --at_once 8 --out figures.jsonl \\
        --rows "prior --train_batch_size 1" "unet --train_batch_size 8" --sides reference ours "ours --compile off" floor
    python scripts/benchmark.py --model SD1 --precision bf16 --steps 15 --repeats 1 --at_once 4 --out figures.jsonl \\
        --rows "prior --train_batch_size 1" "unet --train_batch_size 8" --sides "reference --compile on" "ours --compile on"
    python scripts/benchmark.py --model SD1 --precision bf16 --repeats 1 --out figures.jsonl \\
        --rows "draw --train_batch_size 4" --sides reference ours
    python scripts/benchmark.py --model SD2 --precision bf16 --steps 10 --repeats 1 --out figures.jsonl \\
        --rows "unet --train_batch_size 64" --sides ours
"""

import itertools
import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import counting
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tables import markdown
from torch import Tensor

import minibooth
from minibooth import command, train
from minibooth.command import DTYPES
from minibooth.dreambooth import speed
from minibooth.dreambooth.parallel import Ranks
from minibooth.dreambooth.prior import DRAWING
from minibooth.dreambooth.settings import Settings
from minibooth.errors import UserError

ROWS = {  # what a step is, in flags; of one picture (and one of the class), unless more flags say otherwise
    "unet": "",
    "prior": "--with_prior_preservation",
    "text": "--train_text_encoder",
    "lora": "--rank 4 --learning_rate 1e-4",
    "draw": "",  # a batch of pictures
    "load": "",  # a pipeline, until every weight was read
}
TITLES = ["row", "precision", "side", "seconds", "/ reference", "pictures/s", "GiB", "/ reference", "floor / seconds", "first"]
SIDES = "reference", "ours", "floor"
PROMPTS = {"instance_prompt": "a photo of sks dog", "class_prompt": "a photo of dog"}
FOLDERS = "instance_data_dir", "class_data_dir"  # of the same pictures
READY = "ready to be measured"
Step = Callable[[int], None]


def settings(job: dict[str, Any]) -> Settings:
    """The run that a job describes. Raises UserError for a row, a side or flags that are not there."""
    folder, (row, *flags), (_, side, more) = Path(job["folder"]), shlex.split(job["row"]) or [""], parse_side(job["side"])
    if row not in ROWS or side not in SIDES:
        raise UserError(f"{row} by {side}: --rows are {', '.join(ROWS)}, and --sides {', '.join(SIDES)}")
    named = PROMPTS | {name: str(folder / name) for name in FOLDERS}
    named |= {"pretrained_model_name_or_path": job["model"], "output_dir": str(folder / "run"), "num_class_images": 1}
    named |= {"resolution": job["resolution"], "train_batch_size": 1, "max_train_steps": job["steps"] + 1}
    named |= {"mixed_precision": job["precision"].replace("fp32", "no"), "device": job["device"], "seed": 0}
    words = [f"--{name}={value}" for name, value in named.items()]
    return train.parse([*words, *shlex.split(ROWS[row]), *flags, *more])


def parse_side(text: str) -> tuple[dict[str, str], str, list[str]]:
    """A side as variables of the environment, its name, and flags."""
    words = shlex.split(text)
    variables = [*itertools.takewhile(lambda word: "=" in word, words)]
    name, *flags = words[len(variables) :] or [""]
    return dict(word.split("=", 1) for word in variables), name, flags


def ours(s: Settings) -> Step:
    """The trainer itself, ready for its first step."""
    trainer = train.trainer(s, Ranks(torch.device(s.device or "cpu")))
    trainer.prepare()

    def step(n: int) -> None:
        trainer.set_learning_rates(n)
        trainer.step(n)

    return step


def reference(s: Settings) -> Step:
    """train_dreambooth.py's loop (train_dreambooth_lora.py's, where a rank is given), ready for its first step."""
    from accelerate import Accelerator
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    model, dtype = s.pretrained_model_name_or_path, DTYPES[s.mixed_precision or "no"]
    how = {"dynamo_backend": "inductor"} if s.compile == "on" else {}
    accelerator = Accelerator(mixed_precision=s.mixed_precision, cpu=s.device == "cpu", **how)
    tokenizer = CLIPTokenizer.from_pretrained(model, subfolder="tokenizer")
    scheduler = DDPMScheduler.from_pretrained(model, subfolder="scheduler")
    text_encoder = CLIPTextModel.from_pretrained(model, subfolder="text_encoder").requires_grad_(s.train_text_encoder)
    vae = AutoencoderKL.from_pretrained(model, subfolder="vae").requires_grad_(False)
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    if s.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if s.rank:
        from peft import LoraConfig

        unet.requires_grad_(False).to(accelerator.device, dtype)
        layers = ["to_k", "to_q", "to_v", "to_out.0"]
        unet.add_adapter(LoraConfig(r=s.rank, lora_alpha=s.rank, init_lora_weights="gaussian", target_modules=layers))
    trained = [unet, text_encoder] if s.train_text_encoder else [unet]
    parameters = [p for network in trained for p in network.parameters() if p.requires_grad]
    how = {"lr": s.learning_rate, "betas": (s.adam_beta1, s.adam_beta2), "weight_decay": s.adam_weight_decay}
    optimizer = accelerator.prepare(torch.optim.AdamW(parameters, eps=s.adam_epsilon, **how))
    trained = [accelerator.prepare(network).train() for network in trained]
    unet, text_encoder = trained[0], trained[1] if s.train_text_encoder else text_encoder.to(accelerator.device, dtype)
    vae.to(accelerator.device, dtype)

    def example(n: int, prompt: str, folder: str | None) -> tuple[Tensor, Tensor]:
        paths = sorted(Path(folder or "").iterdir())
        picture = Image.open(paths[n % len(paths)]).convert("RGB").resize((s.resolution, s.resolution))
        ids = tokenizer(prompt, truncation=True, padding="max_length", max_length=77, return_tensors="pt").input_ids
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1, ids

    def step(n: int) -> None:
        kinds = [(s.instance_prompt, s.instance_data_dir), (s.class_prompt, s.class_data_dir)][: 1 + s.with_prior_preservation]
        examples = [example(n * s.train_batch_size + i, *kind) for kind in kinds for i in range(s.train_batch_size)]
        pixels, ids = (torch.cat(column).to(accelerator.device) for column in zip(*examples, strict=True))
        x0 = vae.encode(pixels.to(dtype)).latent_dist.sample() * vae.config.scaling_factor
        noise = torch.randn_like(x0)
        t = torch.randint(0, scheduler.config.num_train_timesteps, (len(x0),), device=x0.device)
        context = text_encoder(ids, return_dict=False)[0]
        prediction = unet(scheduler.add_noise(x0, noise, t), t, context, return_dict=False)[0]
        velocity = scheduler.config.prediction_type == "v_prediction"
        target = scheduler.get_velocity(x0, noise, t) if velocity else noise
        halves = zip(prediction.chunk(len(kinds)), target.chunk(len(kinds)), strict=True)
        loss = sum(F.mse_loss(found.float(), wanted.float()) for found, wanted in halves)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parameters, s.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=s.set_grads_to_none)
        loss.detach().item()

    return step


def opener(name: str) -> Callable[..., Any]:
    """What reads a pipeline."""
    if name == "ours":
        return minibooth.load
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained


def draws(s: Settings, name: str, dtype: torch.dtype, steps: int) -> Step:
    """Class pictures as either trainer draws them; the first time in four steps, to warm up."""
    mine, prompts, side = name == "ours", [s.class_prompt] * s.train_batch_size, s.resolution
    pipe = opener(name)(s.pretrained_model_name_or_path, **{"dtype" if mine else "torch_dtype": dtype})
    for network in (pipe.unet, pipe.vae, pipe.text_encoder):
        network.to(s.device)
    if mine:
        speed.draw_faster(pipe, s, torch.device(s.device))
    elif s.compile == "on":
        pipe.unet.compile()

    def step(n: int) -> None:
        if mine:
            pipe.generate(prompts, None, side, side, seed=0, **DRAWING | {"steps": steps if n else 4})
        else:
            pipe(prompts, height=side, width=side, num_inference_steps=steps if n else 4)

    return step


def loads(s: Settings, name: str) -> Step:
    """A pipeline in the precision of its files, and a look at every page of its weights."""
    load = opener(name)

    def step(n: int) -> None:
        pipe = load(s.pretrained_model_name_or_path)
        for network in (pipe.unet, pipe.vae, pipe.text_encoder):
            for x in network.parameters():
                x.detach().view(-1)[::1024].sum()

    return step


def wait_for_turn() -> None:
    """Tell `measure` that all is set up, until it says go."""
    print(READY, flush=True)
    sys.stdin.readline()


def work(job: dict[str, Any]) -> dict[str, Any]:
    """One measurement, in this process: set up, a first step, and when its turn comes what counts."""
    s, row, name, dtype = settings(job), shlex.split(job["row"])[0], parse_side(job["side"])[1], DTYPES[job["precision"]]
    pictures = {"pictures": s.train_batch_size * (1 + s.with_prior_preservation)} if row != "load" else {}
    if name == "ours":
        command.ready_torch()  # as python -m minibooth.train would
    if name == "floor":
        wait_for_turn()
        return counting.floor(s, dtype) | pictures
    pipelines = {"draw": lambda: draws(s, name, dtype, job["draw_steps"]), "load": lambda: loads(s, name)}
    step = pipelines[row]() if row in pipelines else {"ours": ours, "reference": reference}[name](s)
    counting.seconds(lambda: step(0), job["device"])
    first, steps = time.time() - job["began"], 1 if row in pipelines else job["steps"]
    wait_for_turn()
    taken = [counting.seconds(lambda n=n: step(n), job["device"]) for n in range(1, 1 + steps)]
    resident = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # as Linux counts it
    gpu = {"memory": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    return {"seconds": taken, "first": first, "memory": resident} | pictures | (gpu if job["device"] == "cuda" else {})


def measure(jobs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Measurements in processes of their own, of each what `work` returns, or the error that ended it."""
    with ExitStack() as stack:
        running = []
        for job in jobs:
            argv = [sys.executable, __file__, "--job", json.dumps(job | {"began": time.time()})]
            variables, *_ = parse_side(job["side"])
            errors = stack.enter_context(tempfile.TemporaryFile("w+"))
            how = {"env": os.environ | variables, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            process = subprocess.Popen(argv, stderr=errors, **how)
            stack.callback(process.kill)
            running.append((process, errors))
        for process, _ in running:
            next((line for line in process.stdout if line.strip() == READY), None)  # whatever else it prints before
        for process, errors in running:
            printed, _ = process.communicate("go\n")
            errors.seek(0)
            last = (errors.read().strip().splitlines() or [f"ended by signal {-process.returncode}"])[-1]
            yield {"error": last} if process.returncode else json.loads(printed.splitlines()[-1])


def medians(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Of one side's measurements of one row."""
    good = [line for line in lines if "error" not in line]
    columns = {name: [line[name] for line in good] for name in ("first", "memory", "pictures") if good and name in good[0]}
    columns["seconds"] = [each for line in good for each in line["seconds"]]
    return {name: median(values) for name, values in columns.items() if values}


def table(lines: list[dict[str, Any]]) -> str:
    """Medians by row, precision and side; beside them, how many times the reference's without flags they are."""
    rows = []
    groups: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for line in lines:
        groups.setdefault((line["row"], line["precision"]), {}).setdefault(line["side"], []).append(line)
    for key, sides in groups.items():
        found = {side: medians(same) for side, same in sides.items()}
        base, least = found.get("reference", {}), found.get("floor", {}).get("seconds")
        for side, own in found.items():
            taken, held, first = own.get("seconds"), own.get("memory"), own.get("first")
            figures = [
                (taken, 1, "{:.3f}"), (taken, base.get("seconds"), "{:.2f}"), (own.get("pictures"), taken, "{:.2f}"),
                (held, 2**30, "{:.2f}"), (held, base.get("memory"), "{:.2f}"), (least, taken, "{:.2f}"), (first, 1, "{:.1f}"),
            ]  # fmt: skip
            cells = [how.format(value / unit) if value and unit else "" for value, unit, how in figures]
            rows.append([*key, side, *(cells if own else [sides[side][0]["error"]])])
    return markdown(TITLES, rows)


def main(argv: Sequence[str]) -> None:
    """Every measurement, in turns; then the table."""
    if argv[:1] == ["--job"]:  # what `measure` starts
        return print(json.dumps(work(json.loads(argv[1]))))
    parser, whole = command.Parser("python scripts/benchmark.py", __doc__.splitlines()[0]), command.within(1)
    parser.add_argument("--model", type=Path, required=True, help="folder in the diffusers layout")
    parser.add_argument("--rows", nargs="+", default=[*ROWS], help=", ".join(ROWS))
    parser.add_argument("--sides", nargs="+", default=[*SIDES], help=", ".join(SIDES))
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=[*DTYPES])
    parser.add_argument("--resolution", type=whole, default=512)
    parser.add_argument("--pictures", type=whole, default=4, help="photographs, and as many class pictures")
    parser.add_argument("--steps", type=whole, default=3, help="steps of a measurement, after a first one that does not count")
    parser.add_argument("--draw_steps", type=whole, default=50, help="steps of drawing")
    parser.add_argument("--repeats", type=whole, default=3, help="measurements of each row, side and precision")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--at_once", type=whole, default=1, help="processes to set up side by side (default 1)")
    parser.add_argument("--out", type=Path, default=Path(os.devnull), help="file of JSON lines to append to")
    args = parser.parse_args(command.normalise(argv))
    command.device(args.device)
    lines = []
    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"{os.cpu_count()} cores"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, n in itertools.product(FOLDERS, range(args.pictures)):
            noise = np.random.default_rng(n).integers(0, 256, (args.resolution, args.resolution, 3), np.uint8)
            (folder / name).mkdir(exist_ok=True)
            Image.fromarray(noise).save(folder / name / f"{n}.png")
        same = {name: getattr(args, name) for name in ("resolution", "steps", "draw_steps", "device")}
        same |= {"model": str(counting.filled(args.model, folder)), "folder": temporary}
        jobs = [
            {"row": row, "precision": precision, "side": side, "repeat": repeat} | same
            for repeat, precision, row, side in itertools.product(range(args.repeats), args.precision, args.rows, args.sides)
            if parse_side(side)[1] != "floor" or shlex.split(row)[:1] not in (["draw"], ["load"])
        ]
        for job in jobs:
            settings(job).check()  # what would stop one is to be known now
        for i in range(0, len(jobs), args.at_once):
            some = jobs[i : i + args.at_once]
            for job, found in zip(some, measure(some), strict=True):
                lines.append(job | {"machine": machine, "torch": torch.__version__} | found)
                print(json.dumps(lines[-1]), flush=True)
                with args.out.open("a") as file:
                    file.write(json.dumps(lines[-1]) + "\n")
    print(table(lines))


if __name__ == "__main__":
    try:  # without `command.run`, whose settings of PyTorch the reference would inherit
        main(sys.argv[1:])
    except UserError as error:
        print(f"benchmark: error: {error}", file=sys.stderr)
        sys.exit(2)
