"""The paper's measures: is it the subject, what the prompt says, the class as it was. Ruiz et al. 2022, sections 4.1 and 4.3.

    DINO, CLIP-I   likeness(pictures of the subject's prompts, its real pictures); `ceiling` is what real pictures reach
    CLIP-T         agreement(pictures, their prompts), the identifier included
    PRES           likeness(pictures of the class prompt, the subject's real pictures), by DINO (else CLIP); low is good
    DIV            diversity(pictures of one subject and prompt); high is good

Each is a mean over pairs, which the paper's tables average over subjects and prompts. `Encoder` gives the embeddings.

Shapes: A, B pictures, D width of an embedding, which need not be normalised.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from minibooth.checkpoint import files
from minibooth.checkpoint.source import fill, on_meta, snapshot
from minibooth.dreambooth.data import open_picture
from minibooth.errors import UserError, blaming
from minibooth.models.config import ViTConfig
from minibooth.models.tokenizer import Tokenizer
from minibooth.models.vision import CLIP, LPIPS, VisionModel, from_vit, preprocessor

# By model_type, from config.json.
ENCODERS: dict[str, Callable[[dict], Any]] = {"clip": CLIP, "vit": lambda config: VisionModel(ViTConfig.from_dict(config))}
PUBLISHED = {"clip": "openai/clip-vit-base-patch32@refs/pr/15", "dino": "facebook/dino-vits16@refs/pr/1"}
BATCH = 32  # pictures that are looked at together
UNUSED = re.compile(r"embeddings\.position_ids$|^pooler\.")  # a constant; what ViTs have on top and DINO does not use


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Of each row of a [A, D] with each of b [B, D]: [A, B], in fp32."""
    return F.normalize(a.float(), dim=1) @ F.normalize(b.float(), dim=1).T


def likeness(pictures: Tensor, real: Tensor) -> float:
    """Mean cosine of pictures [A, D] with real ones [B, D], every one with every one."""
    return cosines(pictures, real).mean().item()


def ceiling(real: Tensor) -> float:
    """Mean cosine of different real pictures [B, D], each pair once; nan for a single picture."""
    rows, columns = torch.triu_indices(len(real), len(real), offset=1)
    return cosines(real, real)[rows, columns].mean().item()


def agreement(pictures: Tensor, prompts: Tensor) -> float:
    """Mean cosine of each picture [B, P] with its prompt: [B, P], or [1, P] for all."""
    return F.cosine_similarity(pictures.float(), prompts.float()).mean().item()


@torch.no_grad()
def diversity(pictures: Tensor, distance: Callable[[Tensor, Tensor], Tensor]) -> float:
    """Mean distance of different pictures [B, 3, H, W] in [-1, 1], each pair once; nan for a single picture."""
    pairs = zip(*(x.split(BATCH) for x in torch.triu_indices(len(pictures), len(pictures), offset=1)), strict=True)
    return torch.cat([distance(pictures[rows], pictures[columns]).flatten() for rows, columns in pairs]).mean().item()


class Encoder:
    """A published CLIP or DINO: pictures, and with CLIP prompts, to embeddings [B, D], not normalised.

    source: a folder with config.json, model.safetensors, preprocessor_config.json and, with CLIP, the vocabulary; or its name
    on the hub, and after an @ the revision there. PUBLISHED are the paper's DINO and, as it does not say which, CLIP's
    ViT-B/32; both of pull requests, since the main branches hold but a pickle. The network is in fp32 on `device`.
    `kind`: refuse any but this one of ENCODERS. Raises UserError for what is missing, damaged or of another kind.
    """

    def __init__(self, source: str | Path, device: torch.device | str = "cpu", kind: str | None = None):
        folder = Path(source)
        if not folder.is_dir():
            name, _, revision = str(source).partition("@")
            folder = snapshot(name, ["*.json", "*.txt", "model*.safetensors"], revision or None)
        config = files.read_json(folder / "config.json")
        if (found := str(config.get("model_type"))) not in ([kind] if kind else ENCODERS):
            wanted = f"needed is {kind}" if kind else f"supported: {', '.join(ENCODERS)}"
            raise UserError(f"{source} holds a model of type {found}; {wanted} (DINO is a vit)")
        tensors = files.weights_of(folder, "model")
        weights = {name: tensors[name] for name in tensors if not UNUSED.search(name)}
        with blaming(source):
            self.preprocess = preprocessor(files.read_json(folder / "preprocessor_config.json"))
            weights = from_vit(weights) if found == "vit" else weights
            self.network = fill(on_meta(lambda: ENCODERS[found](config)), weights, f"{source}: model", torch.float32, device)
            if found == "clip":
                small = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".json", ".txt")}
                self.tokenizer = Tokenizer.from_files(small)
            if not self.images([Image.new("RGB", (8, 8))]).isfinite().all():
                raise UserError("what it says of a black picture is not finite: download it again")

    @torch.no_grad()
    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """RGB pictures of any sizes -> [B, D]."""
        like = next(self.network.parameters())
        batches = (pictures[start : start + BATCH] for start in range(0, len(pictures), BATCH))
        return torch.cat([self.network(torch.stack([*map(self.preprocess, batch)]).to(like)) for batch in batches])

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> [B, P]; CLIP's alone."""
        return self.network.read(self.tokenizer(prompts).to(self.network.logit_scale.device))


class Watch:
    """What an encoder says of a run on the way, beside the subject's photographs: cheap stand-ins for the paper's figures.

    source, device: as `Encoder`, which raises UserError.
    """

    def __init__(self, source: str | Path, photographs: Sequence[Path], device: torch.device):
        self.eyes = Encoder(source, device=device)
        self.real = self.eyes.images([*map(open_picture, photographs)])

    def measure(self, subject: Sequence[Image.Image], of_class: Sequence[Image.Image]) -> dict[str, float]:
        """The likeness of pictures of the subject's prompts; with pictures of the bare class, theirs (it drifts to the
        subject) and how different they are, by 1 - cosine.
        """
        figures = {"subject_similarity": likeness(self.eyes.images(subject), self.real)}
        if of_class:
            figures["class_drift"] = likeness(seen := self.eyes.images(of_class), self.real)
        if len(of_class) > 1:
            figures["class_diversity"] = 1 - ceiling(seen)
        return figures


def open_lpips(path: str | Path, device: torch.device | str = "cpu") -> LPIPS:
    """LPIPS from a safetensors file, as the distance that `diversity` takes."""
    return fill(on_meta(LPIPS), files.Tensors([Path(path)]), f"{path}: model", torch.float32, device)
