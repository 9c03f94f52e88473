"""What torch.compile makes of us: a step without breaks, few kernels at Stable Diffusion's real shapes, and equal numbers."""

import functools

import pytest
import torch
from comparing import error, normals, weights
from PIL import Image
from small_run import metrics as metrics_of
from small_run import small, train, trainer, with_class
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor import async_compile, metrics

from minibooth.diffusion import samplers
from minibooth.diffusion.images import to_tensor
from minibooth.diffusion.scheduler import DDPMScheduler
from minibooth.dreambooth import speed
from minibooth.dreambooth.objective import dreambooth_loss
from minibooth.dreambooth.optimizer import BLOCK, code, update
from minibooth.dreambooth.settings import Settings
from minibooth.dreambooth.weights import recompute_activations
from minibooth.models import ops
from minibooth.models.blocks import NormSiLU
from minibooth.models.config import UNetConfig
from minibooth.models.unet import UNet

SIDES = {64: (320, 640, 960), 32: (320, 640, 960, 1280, 1920), 16: (640, 1280, 1920, 2560), 8: (1280, 2560)}
SHAPES = [(channels, side) for side, each in SIDES.items() for channels in each]  # all of Stable Diffusion 1.4's at 512 pixels
LATENT, T = (2, 4, 64, 64), torch.tensor([3, 700])
SCHEDULER = DDPMScheduler({"_class_name": "DDPMScheduler", "prediction_type": "v_prediction"})


@pytest.fixture(autouse=True)
def fresh(tmp_path_factory, monkeypatch):
    """Nothing that was compiled elsewhere counts here, and nothing is left behind."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "compiled"))
    torch._dynamo.reset()
    counters.clear()
    metrics.reset()
    yield
    torch._dynamo.reset()


def norms(modules: nn.ModuleList, xs: list[Tensor], times: list[Tensor]) -> list[Tensor]:
    """GroupNorm and SiLU after the shift by an embedded time, at every shape."""
    return [norm(x + time[..., None, None]) for norm, x, time in zip(modules, xs, times, strict=True)]


def noised(x0: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """What the network sees, and what it should say."""
    return SCHEDULER.add_noise(x0, noise, T), SCHEDULER.target(x0, noise, T)


def loss(prediction: Tensor, target: Tensor) -> Tensor:
    return dreambooth_loss(prediction, target, T, SCHEDULER, 1.0, 5.0)["loss"]


def guided(x: Tensor, outputs: Tensor) -> Tensor:
    """Classifier-free guidance and a step of ddim."""
    x0, e = samplers._split(x, torch.lerp(*outputs.chunk(2), 7.5), 0.5, SCHEDULER)
    return 0.8 * x0 + 0.6 * e


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [normals(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]


def of_norms(shapes) -> tuple:
    modules = nn.ModuleList(NormSiLU(32, channels) for channels, _ in shapes)
    speed.suit(modules, torch.device("cpu"), torch.bfloat16)
    return modules, leaves(*((2, channels, side, side) for channels, side in shapes)), leaves(*((2, c) for c, _ in shapes))


# An operation, its inputs, as Stable Diffusion has them and small ones, the most kernels forward and backward. Of a norm's most
# are on a CPU loops over a group's few numbers, 16 and 7 with torch 2.13, 12 and 9 with 2.11; a GPU takes 3 and 4, as its own
# test says.
CASES = {
    "norm_silu": (norms, lambda: of_norms(SHAPES), lambda: of_norms([(64, 4), (96, 8)]), 16 * len(SHAPES), 9 * len(SHAPES)),
    "geglu": (ops.geglu, lambda: leaves((2, 4096, 2560)), lambda: leaves((2, 8, 64)), 1, 1),
    "quick_gelu": (ops.quick_gelu, lambda: leaves((2, 77, 3072)), lambda: leaves((2, 7, 64)), 1, 1),
    "noised": (noised, lambda: normals(2, *LATENT), lambda: normals(2, 2, 4, 8, 8), 1, 0),
    "loss": (loss, lambda: leaves(LATENT, LATENT), lambda: leaves((2, 4, 8, 8), (2, 4, 8, 8)), 4, 3),
    "guided": (guided, lambda: leaves(LATENT, (4, 4, 64, 64)), lambda: leaves((2, 4, 8, 8), (4, 4, 8, 8)), 1, 1),
}


def flat(values) -> list[Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(values) if isinstance(x, Tensor) and x.requires_grad]


def backward(values) -> None:
    if values := flat(values):
        torch.autograd.backward(values, [value.detach() for value in values])


@pytest.mark.parametrize("name", CASES)
def test_an_operation_is_one_graph_of_few_kernels(name, monkeypatch):
    """Kernels are counted as they are written, and not built."""
    f, inputs, _, forward, back = CASES[name]
    monkeypatch.setattr(async_compile.AsyncCompile, "cpp_pybinding", lambda self, *args, **options: lambda *tensors: None)
    values = torch.compile(f, fullgraph=True, dynamic=False)(*inputs())
    written = metrics.generated_kernel_count
    backward(values)
    assert counters["stats"]["unique_graphs"] == 1
    assert 1 <= written <= forward
    assert min(back, 1) <= metrics.generated_kernel_count - written <= back


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("channels, side", SHAPES[::4])
def test_on_a_gpu_a_norm_is_few_kernels(channels, side):
    """One for the means of channels, one for those of groups, one over the picture; back, one more. Nothing is copied."""
    norm = nn.ModuleList([NormSiLU(32, channels).cuda()])
    x = normals(2, channels, side, side).cuda().to(memory_format=torch.channels_last).requires_grad_()
    wanted = norm[0](x)
    gradient = torch.autograd.grad(wanted, x, torch.ones_like(x))
    speed.suit(norm, x.device, torch.float32)
    speed.compile_layers(norm)
    found = norm[0](x)
    forward = metrics.generated_kernel_count
    assert error(torch.autograd.grad(found, x, torch.ones_like(x))[0], gradient[0]) < 1e-5
    assert error(found, wanted) < 1e-5
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert (forward, metrics.generated_kernel_count - forward) == (3, 4)


def test_operations_have_the_numbers_of_their_eager_forms():
    """All of them in one graph, values and gradients."""
    made = {name: small() for name, (_, _, small, *_) in CASES.items()}

    def every(inputs):
        return [CASES[name][0](*each) for name, each in inputs.items()]

    def found(f) -> list[Tensor]:
        values = f(made)
        backward(values)
        gradients = [x.grad for x in flat(made)]
        for x in flat(made):
            x.grad = None
        return [x.detach() for x in flat(values)] + gradients

    pairs = zip(found(every), found(torch.compile(every, fullgraph=True)), strict=True)
    assert max(error(ours, eager) for eager, ours in pairs) < 1e-5


def test_the_update_has_its_eager_numbers():
    """In bf16 with moments in 8 bits, where all of it is at work."""

    def run(kernel) -> list[Tensor]:
        p, g = normals(4, BLOCK).bfloat16(), normals(4, BLOCK, seed=1).bfloat16()
        moments = [(torch.zeros(4, BLOCK, dtype=torch.uint8), torch.zeros(4), *code(signed)) for signed in (True, False)]
        for step in range(1, 4):
            kernel(p, g, *moments, torch.tensor(1.5), torch.tensor(float(step)), 1e-2 / step, 0.1, 0.9, 0.999, 1e-8, 7)
        return [p.float(), moments[0][1], moments[1][1]]

    compiled = torch.compile(update, fullgraph=True, dynamic=True)
    assert max(error(ours, eager) for eager, ours in zip(run(update), run(compiled), strict=True)) < 1e-2
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("kinds, close, more", [
    (13, 1e-5, {}), (14, 1e-5, {"train_text_encoder": True, "gradient_checkpointing": True, "snr_gamma": 5.0}),
    (13, 2e-3, {"mixed_precision": "bf16"}),
])  # fmt: skip
def test_a_compiled_run_is_the_eager_one(kinds, close, more, tmp_path, monkeypatch):
    """As graphs of PyTorch's own operations: no breaks, nothing compiled after the first step, files with the same names."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    losses, left = {}, {}
    for mode in ("off", "on"):
        run = trainer(small(tmp_path, compile=mode, output_dir=str(tmp_path / mode), **with_class(tmp_path), **more))
        run.prepare()
        run.set_learning_rates(0)
        losses[mode] = [run.step(0)["loss"]]
        graphs = counters["stats"]["unique_graphs"]
        losses[mode] += [run.step(step)["loss"] for step in (1, 2)]
        run.save_checkpoint(3)
        left[mode] = weights(tmp_path / mode / "checkpoint-3")
    assert graphs == counters["stats"]["unique_graphs"] == kinds
    assert not counters["graph_break"]
    assert losses["on"] == pytest.approx(losses["off"], rel=close)
    assert left["on"].keys() == left["off"].keys()
    assert len({*losses["on"]}) == 3
    assert (
        max(error(left["on"][name], left["off"][name]) for name in left["on"]) < 30 * close
    )  # as the first steps of Adam have it


@pytest.mark.parametrize("recomputed", [False, True])
def test_layers_that_are_alike_are_compiled_once(recomputed, tmp_path, monkeypatch):
    """Of the 125 in Stable Diffusion 1.4's UNet there are 26 kinds at 512 pixels."""
    graphs: list[torch.fx.GraphModule] = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=count))
    with torch.device("meta"):
        unet = UNet(UNetConfig(cross_attention_dim=768))
        inputs = torch.empty(8, 4, 64, 64), torch.empty(8, dtype=torch.long), torch.empty(8, 77, 768)
    if recomputed:
        recompute_activations(unet)
    speed.compile_layers(unet)
    unet(*inputs).sum().backward()
    assert len([layer for layer in unet.modules() if isinstance(layer, speed.FUSED)]) == 125
    assert len(graphs) == 26


def test_without_a_compiler_it_is_said_in_a_line(monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    speed.compiler.cache_clear()
    decided = [speed.compilable(Settings(compile=choice), torch.device("cpu")) for choice in ("on", "auto", "off", "on")]
    assert decided == [False, False, False, False]
    assert capsys.readouterr().out == "not compiled, for lack of no-such-compiler: every step takes longer\n"
    monkeypatch.setattr(speed.shutil, "which", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (6, 1))
    monkeypatch.setattr(speed.importlib.util, "find_spec", lambda name: name)
    with monkeypatch.context() as without:
        without.setattr(speed.sysconfig, "get_path", lambda name: "nowhere")
        speed.compiler.cache_clear()
        assert not speed.compilable(Settings(compile="on"), torch.device("cuda"))
    lacking = "Python.h and a GPU of capability 7.0"
    assert capsys.readouterr().out == f"not compiled, for lack of {lacking}: every step takes longer\n"
    monkeypatch.setattr(speed.Path, "exists", lambda path: True)
    speed.compiler.cache_clear()
    assert speed.compilable(Settings(compile="on"), torch.device("cpu"))
    pays = [speed.compilable(Settings(compile=choice), torch.device("cpu"), pays=True) for choice in ("auto", "off")]
    assert pays == [True, False]


def test_a_gpu_replays_unless_told_not_to():
    devices = [torch.device(name) for name in ("cuda", "cpu", "mps")]
    for choice, there in (("auto", True), ("on", True), ("off", False)):
        assert [speed.replayable(Settings(compile=choice), each) for each in devices] == [there, False, False]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("close, more", [
    (1e-3, {"gradient_accumulation_steps": 2, "train_text_encoder": True}),
    (1e-3, {"rank": 4, "lora_targets": "all", "gradient_checkpointing": True}),
    (1e-2, {"use_8bit_adam": True, "full_bf16": True, "mixed_precision": "bf16", "train_text_encoder": True}),
    (1e-2, {"use_8bit_adam": True, "fused_backward_pass": True, "max_grad_norm": 0.0, "gradient_checkpointing": True}),
])  # fmt: skip
def test_a_replayed_run_is_the_eager_one(close, more, tmp_path):
    """Class pictures, the last batch of them smaller, and steps at a falling rate."""
    losses, drawn = {}, {}
    for mode in ("off", "auto"):
        how = dict(
            compile=mode, device="cuda", output_dir=str(tmp_path / mode), with_prior_preservation=True, class_prompt="a dog",
            num_class_images=7, sample_batch_size=4, lr_scheduler="linear", lr_warmup_steps=0, max_train_steps=8, **more,
        )  # fmt: skip
        train(small(tmp_path, **how))
        losses[mode] = [line["loss"] for line in metrics_of(tmp_path / mode)]
        drawn[mode] = [to_tensor(Image.open(path)) for path in sorted((tmp_path / mode).glob("class/drawn-*/*.png"))]
    assert losses["auto"] == pytest.approx(losses["off"], rel=close)
    assert len({*losses["auto"]}) == 8
    assert max((ours - eager).abs().max() for ours, eager in zip(drawn["auto"], drawn["off"], strict=True)) < 0.05
