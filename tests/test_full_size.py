"""At full size, Stable Diffusion 1.4, 2.1 and x4 give diffusers' numbers, and load no slower than there.

    MINIBOOTH_FULL_SIZE=folder pytest -m full_size -s tests/test_full_size.py

The folder holds checkpoints in the diffusers layout, sd14-full, sd21-full and x4-full. -s shows the figures.
"""

import gc
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from comparing import difference, error, gradients, normals, reference, worst_error
from PIL import Image

import minibooth
from minibooth.checkpoint.source import Source

pytestmark = pytest.mark.full_size

SAMPLERS = {"sd14-full": "pndm", "sd21-full": "ddim", "x4-full": "ddim"}  # of their own schedulers
NETWORKS = {  # the library and class of each component
    "text_encoder": ("transformers", "CLIPTextModel"),
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
}
# One load in a process of its own: seconds until the weights are usable and until all were read, and memory by then.
MEASURE = """
import json, sys, time
from pathlib import Path

library, folder = sys.argv[1:]
if library == "minibooth":
    from minibooth import load
else:
    from diffusers import DiffusionPipeline
    load = DiffusionPipeline.from_pretrained

def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])

before, start = memory("VmRSS"), time.perf_counter()
pipe = load(folder)
loaded = time.perf_counter() - start
parameters = [x for network in (pipe.unet, pipe.vae, pipe.text_encoder) for x in network.parameters()]
for x in parameters:
    x.detach().view(-1)[::1024].sum()  # a page is 4096 bytes
read = time.perf_counter() - start
size = sum(x.numel() * x.element_size() for x in parameters)
print(json.dumps({"loaded": loaded, "read": read, "memory": (memory("VmHWM") - before) / size}))
"""


@pytest.fixture(scope="module", params=SAMPLERS)
def folder(request):
    root = os.environ.get("MINIBOOTH_FULL_SIZE")
    if not root or not (Path(root) / request.param).is_dir():
        pytest.skip("MINIBOOTH_FULL_SIZE names no folder that holds the checkpoints")
    return Path(root) / request.param


@pytest.fixture(autouse=True)
def all_cores():
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count())
    yield
    torch.set_num_threads(threads)
    gc.collect()


@pytest.fixture
def report(folder, capsys):
    def say(what, value):
        with capsys.disabled():
            print(f"\n{folder.name}: {what} {value}", end="")

    return say


def ours(folder, name):
    return Source.open(folder).build(name)


def theirs(folder, name):
    library, network = NETWORKS[name]
    return getattr(pytest.importorskip(library), network).from_pretrained(folder / name)


def inputs(folder):
    """A latent (and what is beside it), a timestep and a context (and a noise level) for the UNet."""
    config = json.loads((folder / "unet" / "config.json").read_text())
    level = [torch.tensor([20])] if config.get("num_class_embeds") else []
    x, context = normals(1, config["in_channels"], 24, 32), normals(1, 77, config["cross_attention_dim"], seed=1)
    return x, torch.tensor([601]), context, *level


@torch.no_grad()
def test_text_encoder(folder, report):
    ids = Source.open(folder).tokenizer()(["a photo of sks dog", ""])
    found = error(ours(folder, "text_encoder")(ids), theirs(folder, "text_encoder")(ids).last_hidden_state)
    report("text encoder", f"{found:.1e}")
    assert found <= 1e-5


@torch.no_grad()
def test_vae(folder, report):
    images, latents = normals(1, 3, 256, 256).tanh(), normals(1, 4, 32, 32)
    vae, reference = ours(folder, "vae"), theirs(folder, "vae")
    posterior, expected = vae.encode(images), reference.encode(images).latent_dist
    found = {
        "mean": error(posterior.mean, expected.mean),
        "std": error(posterior.std, expected.std),
        "decode": error(vae.decode(latents), reference.decode(latents).sample),
    }
    report("VAE", {name: f"{value:.1e}" for name, value in found.items()})
    assert max(found.values()) <= 1e-5


@torch.no_grad()
def test_unet(folder, report):
    expected = theirs(folder, "unet")(*inputs(folder)).sample
    found = error(ours(folder, "unet")(*inputs(folder)), expected)
    report("UNet", f"{found:.1e}")
    assert found <= 1e-5


def test_unet_gradients(folder, report):
    """One network at a time, and of the first one its gradients alone stay."""
    told, target = inputs(folder), normals(1, 4, 24, 32, seed=2)
    unet = theirs(folder, "unet")
    expected = gradients(unet, unet(*told).sample, target)
    del unet
    gc.collect()
    unet = ours(folder, "unet")
    found, worst = worst_error(gradients(unet, unet(*told), target), expected)
    report("UNet gradients, the worst parameter's:", f"{found:.1e} ({worst})")
    assert found <= 1e-4


def test_generate(folder, report):
    prompts, negatives = ["a photo of sks dog"], ["blurry"]
    ours = theirs = dict(height=256, width=256)
    if folder.name == "x4-full":
        small = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)).resize((64, 64))
        ours, theirs = dict(images=[small]), dict(image=[small])
    pipe = minibooth.load(folder)
    options = dict(steps=3, guidance_scale=7.5, sampler=SAMPLERS[folder.name], seed=1)
    drawn = pipe.generate(prompts, negative_prompts=negatives, **ours, **options)
    del pipe
    options = dict(num_inference_steps=3, guidance_scale=7.5, generator=torch.Generator().manual_seed(1))
    expected = reference(folder)(prompts, negative_prompt=negatives, **theirs, **options).images
    found = difference(drawn, expected)
    report("generate at 256 px, levels of 255:", f"{found}")
    assert found <= 2


def test_loading(folder, report):
    def measure(library):
        command = [sys.executable, "-c", MEASURE, library, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    for weights in folder.rglob("*.safetensors"):
        file = weights.open("rb", buffering=0)
        while file.read(1 << 24):  # into the system's cache, for everyone alike
            pass
    runs = [(measure("minibooth"), measure("diffusers")) for _ in range(3)]
    median = {key: [statistics.median(run[i][key] for run in runs) for i in range(2)] for key in runs[0][0]}
    for key, unit in (
        ("loaded", "seconds to load"),
        ("read", "seconds to load and read"),
        ("memory", "times the weights"),
    ):
        report(f"{unit}, minibooth and diffusers:", "{:.2f} {:.2f}".format(*median[key]))
    assert median["memory"][0] <= 1.1
    assert median["loaded"][0] <= median["loaded"][1]
    assert median["read"][0] <= median["read"][1]
