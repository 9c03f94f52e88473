"""report.html: a whole run on one page that needs no network, no script from elsewhere and no other file.

Made anew from what lies in the output folder (run.json, metrics.jsonl, samples/) and the photographs, where they still are; its
template is the report.html beside this file.
"""

import base64
import contextlib
import functools
import io
import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from html import escape
from pathlib import Path
from statistics import fmean
from string import Template

from PIL import Image

from minibooth.checkpoint import files
from minibooth.dreambooth.data import open_picture
from minibooth.dreambooth.journal import grids, metrics
from minibooth.dreambooth.settings import Settings
from minibooth.errors import UserError

Points = Sequence[tuple[float, float]]  # step and value
POINTS = 1000  # of a curve at most; in a longer run each is the mean of as many neighbouring ones as it takes
LOSSES = ("subject", "prior")  # together on the first chart
NOISY = {"loss", *LOSSES}  # a step's loss is mostly that of its timestep, drawn by lot: the running mean is what to look at
FEW = 40  # points that are shown one by one
GRID, PHOTOGRAPH, MOST = 1600, 480, 24  # longest sides in pixels; the number of photographs
SHARE = 0.95  # of the rise of a column called similarity; what comes later costs the class more than it is worth
PAGE = Template(Path(__file__).with_suffix(".html").read_text("utf-8"))


def write(folder: Path) -> None:
    """Write folder/report.html, whole or not at all; pictures that are gone are left out. Raises UserError without run.json."""
    run, every = files.read_json(folder / "run.json"), columns(folder)
    s, usual = run["settings"], json.loads(json.dumps(asdict(Settings())))
    steps = max((points[-1][0] for points in every.values()), default=0)
    minutes = sum(seconds for _, seconds in every.get("seconds", ())) / 60
    samples = grids(folder)
    drawn = ((n, encoded(path, GRID)) for n, path in samples)
    captions = (s["validation_prompt"] or "").split("|") + [caption_of(path) for _, path in samples[-1:]]
    images = [f'<img src="{uri}" alt="Drawn at step {n}" data-step={n} hidden>' for n, uri in drawn if uri]
    paths = [path for path in sorted(Path(s["instance_data_dir"]).glob("[!.]*")) if path.is_file()]
    photographs = (encoded(path, PHOTOGRAPH) for path in paths[:MOST])
    real = [f'<img src="{uri}" alt="Photograph of the subject">' for uri in photographs if uri]
    losses = {name: every[name] for name in LOSSES if any(loss for _, loss in every.get(name, ()))}  # no prior: all zeros
    others = sorted(every.keys() - {*LOSSES}, key=lambda name: (len(every[name]), name))  # validation's first
    stops = {name: stop_step(every[name]) for name in others if "similarity" in name and len(every[name]) > 1}
    told = {f.name: f.metadata["help"] for f in fields(Settings)}
    rows: tuple[list[str], list[str]] = ([], [])  # what was set, what was left
    for name, value in s.items():
        cells = name, value if isinstance(value, str) else json.dumps(value), told.get(name, "")
        rows[name in usual and value == usual[name]].append(f"<tr>{tagged('td', cells)}</tr>\n")
    words = ("\\\n  " * word.startswith("--") + shlex.quote(word) for word in shlex.split(run["command"]))
    page = PAGE.substitute(
        title=escape(s["instance_prompt"]), command=escape(" ".join(words)), real="\n".join(real),
        facts=f"{steps} steps at {s['resolution']} px, learning rate {s['learning_rate']:g}, in {minutes:.1f} minutes",
        given="".join(rows[False]), usual="".join(rows[True]), no_grids="hidden" * (not images), no_real="hidden" * (not real),
        grids="\n".join(images), last=len(images) - 1, prompts=tagged("li", filter(None, captions)),
        losses=chart(losses, 720, 260) if losses else "",
        others="".join(chart({name: every[name]}, 350, 150, stops.get(name)) for name in others),
        stop=tagged("p", (f"By {name}, stop at step {n}: first at {SHARE:.0%} of its rise." for name, n in stops.items())),
    )  # fmt: skip
    files.write_text(folder / "report.html", page)


def columns(folder: Path) -> dict[str, list[tuple[float, float]]]:
    """The points of every number in metrics.jsonl, which need not be on each line."""
    found: dict[str, list[tuple[float, float]]] = {}
    for values in metrics(folder):
        for name, value in values.items():
            if name != "step" and isinstance(value, int | float) and math.isfinite(value):
                found.setdefault(name, []).append((values["step"], value))
    return found


def caption_of(path: Path) -> str:
    """What a grid says of its columns; "" where it says nothing, or is no picture."""
    with contextlib.suppress(OSError), Image.open(path) as grid:
        return str(grid.info.get("caption", ""))
    return ""


def encoded(path: Path, side: int) -> str:
    """A picture as a data URI, at most `side` pixels wide and high, without what a camera notes; "" where there is none."""
    with contextlib.suppress(OSError, UserError):
        return _encoded(path, side, path.stat().st_mtime_ns)
    return ""


@functools.lru_cache(1024)  # a run writes its page at every validation
def _encoded(path: Path, side: int, written: int) -> str:
    (picture := open_picture(path)).thumbnail((side, side))
    picture.info.clear()
    picture.save(jpeg := io.BytesIO(), "JPEG", quality=90, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode()}"


def tagged(tag: str, texts: Iterable[str]) -> str:
    """Each text, escaped, in an element of its own."""
    return "".join(f"<{tag}>{escape(text)}</{tag}>" for text in texts)


def stop_step(points: Points) -> float:
    """The first step with SHARE of the rise from the first value to the highest."""
    first, highest = points[0][1], max(value for _, value in points)
    return next(step for step, value in points if value >= first + SHARE * (highest - first))


def thinned(points: Points) -> Points:
    """At most POINTS, each the mean of neighbouring ones."""
    size = math.ceil(len(points) / POINTS)
    groups = (zip(*points[start : start + size], strict=True) for start in range(0, len(points), size))
    return [(fmean(steps), fmean(values)) for steps, values in groups]


def smoothed(points: Points) -> Points:
    """The running mean over a tenth of the curve, centred, narrower at the ends."""
    reach, values = len(points) // 20, [value for _, value in points]
    return [(step, fmean(values[max(0, i - reach) : i + reach + 1])) for i, (step, _) in enumerate(points)]


def ticks(low: float, high: float) -> list[float]:
    """Some four round numbers from low to high."""
    wanted = (high - low or 1) / 4
    power = 10.0 ** math.floor(math.log10(wanted))
    step = min((power * factor for factor in (1, 2, 5, 10)), key=lambda step: abs(step - wanted))
    return [step * k for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def chart(curves: Mapping[str, Points], width: int, height: int, mark: float | None = None) -> str:
    """Curves by name over the steps: a figure with an SVG of width x height, in which `mark` is a step to point out."""
    drawn = {name: thinned(points) for name, points in curves.items()}
    steps, values = zip(*(point for points in drawn.values() for point in points), strict=True)
    margin = (min(values) == max(values)) * (abs(values[0]) or 1)
    left, right, low, high = min(steps), max(steps), min(values) - margin, max(values) + margin

    def at(step: float, value: float) -> tuple[float, float]:
        x, y = (step - left) / (right - left or 1), (high - value) / (high - low)
        return round(46 + x * (width - 56), 1), round(8 + y * (height - 32), 1)

    def line(points: Points, kind: str) -> str:
        return f'<polyline class="{kind}" points="{" ".join("{},{}".format(*at(*point)) for point in points)}"/>'

    levels, whole = ticks(low, high), [step for step in ticks(left, right) if step.is_integer()]
    parts = [f'<path d="M46 {(y := at(left, z)[1])}H{width - 10}"/><text x="38" y="{y + 4:.1f}">{z:.3g}</text>' for z in levels]
    parts += [f'<text class="step" x="{at(step, low)[0]}" y="{height - 4}">{step:.0f}</text>' for step in whole]
    parts += [f'<path class="mark" d="M{at(mark, low)[0]} 8V{height - 24}"/>'] if mark is not None else []
    caption = []
    for i, (name, points) in enumerate(drawn.items()):
        if len(points) > FEW and name in NOISY:
            parts.append(line(points, f"c{i} faint"))
            points = smoothed(points)
        parts.append(line(points, f"c{i}"))
        parts += [f'<circle class="c{i}" cx="{x}" cy="{y}" r="3"/>' for x, y in (at(*p) for p in points) if len(points) <= FEW]
        caption.append(f'<span class="c{i}">{escape(name)}</span> {points[0][1]:.3g} \u2192 {points[-1][1]:.3g}')
    about = f'viewBox="0 0 {width} {height}" role="img" aria-label="{escape(", ".join(drawn))} by step"'
    return f"<figure><figcaption>{' &ensp; '.join(caption)}</figcaption><svg {about}>{''.join(parts)}</svg></figure>\n"
