"""The toy world: captioned pictures, drawn from nothing but a seed.

A `Scene` is a handful of plain values (what, which colour and pattern, wearing what, where, how posed and lit).
It draws itself at any size and says what it shows; the same scene is always the same picture, bit for bit.
Random scenes are the pretraining data. `SUBJECTS` are characters that no caption can describe and that random
scenes never show: the things DreamBooth is asked to learn.

Everything that stands somewhere is a sketch: a few lines of text in a tiny drawing language, one shape a line,

    [both] part|fill PAINT SHAPE NUMBERS...      a solid piece with outline and shaded side | a plain area
    at NAME X Y [WIDTH [TURN]] ...               anchors, where other sketches are put

in hundredths of the sketch's height, with y upwards from the ground. `both` draws a mirror image too, and `42+25p`
moves with the pose, which runs from -1 to 1. Places are functions: they draw what is behind the subject, yield
while it is drawn, and draw what is in front; their coordinates are fractions of the picture, with y downwards.
"""

import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from minibooth import command
from minibooth.diffusion.images import save_png

Colour = str | tuple[int, ...]
Points = Sequence[tuple[float, float]] | np.ndarray
Rng = np.random.Generator

INK, SHADE = "#2b2338", "#3d2350"
PAINTS = {"metal": "#a9b3c4", "dark": "#2b2f42", "cream": "#fff1dc", "gold": "#ffc93c", "rose": "#f59bb0"}
PAINTS |= {"glass": "#bfe8fb", "wood": "#8a5a34", "white": "#ffffff", "pupil": "#241c30", "cheek": "#f59bb0aa"}

# --- colours and patterns --------------------------------------------------------------------------------------------

COLOURS: dict[str, tuple[str, str]] = {  # a body colour and the colour of the pattern on it
    "red": ("#e0393e", "#ffe9d6"),
    "orange": ("#f58a26", "#fff3d9"),
    "yellow": ("#fbd237", "#a85a1c"),
    "green": ("#46a847", "#eafbc8"),
    "teal": ("#17aea8", "#dbfff0"),
    "blue": ("#3c6fe0", "#d9ecff"),
    "purple": ("#8b4fd0", "#f1dcff"),
    "pink": ("#f783b5", "#a31c5c"),
    "brown": ("#8d5a36", "#f3d9b0"),
    "white": ("#f6f4ee", "#5d6a86"),
    "black": ("#3a3a46", "#e8e8f0"),
    "grey": ("#9aa1ac", "#434b5c"),
}


def lattice(u: np.ndarray, v: np.ndarray, step: float) -> tuple[np.ndarray, np.ndarray]:
    """Position relative to the nearest point of a brick-like lattice."""
    row = np.floor(v / step)
    return (u + row % 2 * (step / 2)) % step - step / 2, v - row * step - step / 2


def spotted(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    x, y = lattice(u, v, 0.19)
    return x * x + y * y < 0.0042


def starry(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    x, y = lattice(u, v, 0.27)
    return np.hypot(x, y) < 0.078 + 0.034 * np.sin(5 * np.arctan2(y, x))


PATTERNS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {  # where a point of the body is in the pattern
    "plain": lambda u, v: np.zeros(u.shape, bool),
    "striped": lambda u, v: (v + 0.03) % 0.17 < 0.075,
    "spotted": spotted,
    "checked": lambda u, v: (u % 0.22 < 0.11) ^ (v % 0.22 < 0.11),
    "zigzag": lambda u, v: (v + np.abs(u % 0.2 - 0.1) * 1.1) % 0.21 < 0.085,
    "starry": starry,
}


@lru_cache(maxsize=8192)
def mix(a: Colour, b: Colour = INK, t: float = 0.0) -> tuple[int, ...]:
    """The colour a fraction `t` of the way from `a` to `b`."""
    first, second = (bytes.fromhex(c[1:]) if isinstance(c, str) else c for c in (a, b))
    return tuple(round(x + (y - x) * t) for x, y in zip(first[:3], second[:3], strict=True))


@lru_cache(maxsize=512)
def column(stops: tuple[Colour, ...], height: int) -> Image.Image:
    """A one pixel wide vertical gradient through evenly spaced colours."""
    colours = np.array([mix(stop) for stop in stops], dtype=float)
    at = np.linspace(0, len(stops) - 1, height)
    rows = [np.interp(at, np.arange(len(stops)), colours[:, channel]) for channel in range(3)]
    return Image.fromarray(np.stack(rows, axis=1).round().astype(np.uint8)[:, None])


@lru_cache(maxsize=4)
def halo(strength: int) -> Image.Image:
    """A disc that fades out softly, as a mask to be resized."""
    rim = 75  # the radial gradient reaches its end only in the corners; this is where the disc touches the sides
    levels = [max(0, 255 - v - rim) * strength // (255 - rim) for v in range(256)]
    return Image.radial_gradient("L").point(levels)


# --- shapes ----------------------------------------------------------------------------------------------------------

ARC = np.linspace(0, 1, 9)[:, None]
SPINE = np.linspace(0, 1, 14)[:, None]
CAP = np.linspace(math.pi / 2, -math.pi / 2, 9)[1:-1, None]
CIRCLE = np.linspace(0, math.tau, 40, endpoint=False)


@lru_cache(maxsize=1024)
def soft(radius: float, *xy: float) -> np.ndarray:
    """A closed polygon with rounded corners."""
    corner = np.reshape(xy, (-1, 1, 2))
    arms = [np.roll(corner, shift, axis=0) - corner for shift in (1, -1)]
    before, after = (a * np.minimum(0.5, radius / np.linalg.norm(a, axis=2, keepdims=True).clip(1e-9)) for a in arms)
    return (corner + before * (1 - ARC) ** 2 + after * ARC**2).reshape(-1, 2)


def blob(*xy: float) -> np.ndarray:
    """A closed polygon that is all curves."""
    return soft(math.inf, *xy)


def panel(left: float, bottom: float, right: float, top: float, radius: float) -> np.ndarray:
    """A rectangle with rounded corners."""
    return soft(radius, left, bottom, right, bottom, right, top, left, top)


def oval(x: float, y: float, rx: float, ry: float | None = None) -> np.ndarray:
    """An ellipse, or a circle when only one radius is given."""
    return np.stack([x + rx * np.cos(CIRCLE), y + (ry or rx) * np.sin(CIRCLE)], axis=1)


def star(x: float, y: float, radius: float, tips: float, inner: float, rounding: float) -> np.ndarray:
    """A star with one tip up."""
    turn = math.pi * (0.5 + np.arange(2 * tips) / tips)
    length = np.where(np.arange(2 * tips) % 2, inner, radius)
    return soft(rounding, *np.stack([x + np.cos(turn) * length, y + np.sin(turn) * length], axis=1).ravel().tolist())


def bloom(x: float, y: float, radius: float, petals: float) -> np.ndarray:
    """A flower of round petals."""
    turn = np.linspace(0, math.tau, 60, endpoint=False)
    length = radius * (0.55 + 0.45 * np.sqrt(np.abs(np.sin(turn * petals / 2))))
    return np.stack([x + np.cos(turn) * length, y + np.sin(turn) * length], axis=1)


def tube(*values: float) -> np.ndarray:
    """A bent stroke through (start, bend, end, width[, width at the end]) with a round end."""
    a, b, c = np.reshape(values[:6], (3, 2))
    spine = a * (1 - SPINE) ** 2 + 2 * b * SPINE * (1 - SPINE) + c * SPINE**2
    along = (b - a) * (1 - SPINE) + (c - b) * SPINE
    along = np.where(along.any(axis=1, keepdims=True), along, c - a)  # where two of the points coincide
    along /= np.hypot(along[:, :1], along[:, 1:])
    side = along[:, ::-1] * (-1, 1)
    half = (values[6] + (values[-1] - values[6]) * SPINE) / 2
    cap = spine[-1] + half[-1] * (np.cos(CAP) * along[-1] + np.sin(CAP) * side[-1])
    return np.concatenate([spine + side * half, cap, (spine - side * half)[::-1]])


SHAPES: dict[str, Callable[..., np.ndarray]] = {f.__name__: f for f in (soft, blob, panel, oval, star, bloom, tube)}


class Stroke(NamedTuple):
    """One line of a sketch; its numbers are `base + slope * pose`, and its points are known when it does not move."""

    sides: tuple[int, ...]
    solid: bool
    paint: str
    shape: Callable[..., np.ndarray]
    base: np.ndarray
    slope: np.ndarray
    still: np.ndarray | None

    def points(self, pose: float) -> np.ndarray:
        return self.shape(*(self.base + self.slope * pose).tolist()) if self.still is None else self.still


@lru_cache(maxsize=256)
def parse(sketch: str) -> tuple[list[Stroke], dict[str, tuple[float, ...]]]:
    """The strokes and the anchors of a sketch."""
    strokes, anchors = [], {}
    for line in filter(None, map(str.strip, sketch.splitlines())):
        if line.startswith("at "):
            for name, numbers in re.findall(r"([a-z]+)((?: +-?[\d.]+)+)", line[3:]):
                anchors[name] = tuple(float(number) / 100 for number in numbers.split())
            continue
        both, verb, paint, name, numbers = re.fullmatch(r"(both )?(part|fill) (\S+) (\w+) (.*)", line).groups()
        terms = [re.fullmatch(r"([-\d.]+)(?:([-+][\d.]+)p)?", number).groups("0") for number in numbers.split()]
        base, slope = np.array(terms, dtype=float).T
        shape, sides = SHAPES[name], (1, -1) if both else (1,)
        strokes.append(Stroke(sides, verb == "part", paint, shape, base, slope, None if slope.any() else shape(*base)))
    return strokes, anchors


# --- the pen ---------------------------------------------------------------------------------------------------------


class Pen:
    """A square canvas and the current frame; every method takes coordinates of that frame."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.image = Image.new("RGB", (size, size))
        self.draw = ImageDraw.Draw(self.image, "RGBA")
        self.matrix, self.origin, self.unit = np.eye(2) * size, np.zeros(2), float(size)
        self.paints: dict[str, Colour] = dict(PAINTS)
        self.skin = tuple(Image.new("RGB", (size, size)) for _ in range(2))

    @contextmanager
    def frame(self, x: float, y: float, scale: float = 1, turn: float = 0, sx: int = 1, sy: int = 1) -> Iterator[None]:
        """Draw in a frame at (x, y) that is scaled, turned and mirrored against the current one."""
        outer = self.matrix, self.origin, self.unit
        c, s = math.cos(turn) * scale, math.sin(turn) * scale
        self.origin = self.matrix @ (x, y) + self.origin
        self.matrix = self.matrix @ np.array([[c * sx, -s * sy], [s * sx, c * sy]])
        self.unit *= scale
        yield
        self.matrix, self.origin, self.unit = outer

    def put(self, points: Points) -> np.ndarray:
        """Points of the frame as pixels."""
        return np.asarray(points, dtype=float) @ self.matrix.T + self.origin

    def wide(self, width: float) -> int:
        """A length as whole pixels."""
        return max(1, round(width * self.unit))

    def flat(self, points: Points, colour: Colour) -> None:
        """A plain filled shape."""
        self.draw.polygon(self.put(points).ravel().tolist(), fill=colour)

    def slab(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        """A plain upright rectangle."""
        self.draw.rectangle(self.put(((left, top), (right, bottom))).ravel().tolist(), fill=colour)

    def dot(self, x: float, y: float, radius: float, colour: Colour, squash: float = 1.0) -> None:
        """A plain circle or upright ellipse."""
        (cx, cy), rx = self.put((x, y)), radius * self.unit
        self.draw.ellipse((cx - rx, cy - rx * squash, cx + rx, cy + rx * squash), fill=colour)

    def line(self, points: Points, width: float, colour: Colour) -> None:
        """A stroke of even width."""
        self.draw.line(self.put(points).ravel().tolist(), fill=colour, width=self.wide(width), joint="curve")

    def _box(self, points: np.ndarray) -> tuple[int, int, int, int]:
        """The pixel box of a shape within the canvas, never empty."""
        (left, top), (right, bottom), edge = points.min(0).tolist(), points.max(0).tolist(), self.size - 1
        left, top = (min(max(int(v), 0), edge) for v in (left, top))
        return left, top, min(max(int(right), left), edge) + 1, min(max(int(bottom), top), edge) + 1

    @staticmethod
    def _mask(points: np.ndarray, box: tuple[int, int, int, int], shift: float = 0.0) -> Image.Image:
        """The shape, moved towards the light, as a mask of its box."""
        mask = Image.new("L", (box[2] - box[0], box[3] - box[1]))
        ImageDraw.Draw(mask).polygon((points - (box[0] + shift, box[1] + shift)).ravel().tolist(), fill=255)
        return mask

    def part(self, points: Points, colour: Colour | None = None, edge: bool = True) -> None:
        """A solid piece with outline and shaded side, in a plain colour or (None) in the subject's own skin."""
        pixels = self.put(points)
        if edge:
            ink = self.paints["ink"] if colour is None else mix(colour, INK, 0.72)
            ring = np.concatenate([pixels, pixels[:1]]).ravel().tolist()
            self.draw.line(ring, fill=ink, width=max(2, round(self.size * 0.0175)))
        box = self._box(pixels)
        whole = self._mask(pixels, box)
        lit = ImageChops.darker(whole, self._mask(pixels, box, 0.11 * min(whole.size)))
        if colour is None:
            bright, dim = (skin.crop(box) for skin in self.skin)
        else:
            bright, dim = mix(colour), mix(colour, SHADE, 0.22)
        self.image.paste(dim, box, whole)
        self.image.paste(bright, box, lit)

    def shade(self, points: Points, *stops: Colour) -> None:
        """A shape filled with a vertical gradient."""
        pixels = self.put(points)
        mask = self._mask(pixels, box := self._box(pixels))
        self.image.paste(column(stops, mask.height).resize(mask.size, Image.Resampling.NEAREST), box, mask)

    def sky(self, *stops: Colour, top: float = 0.0, bottom: float = 1.0) -> None:
        """A gradient over the whole width."""
        start, end = round(top * self.size), round(bottom * self.size)
        strip = column(stops, end - start).resize((self.size, end - start), Image.Resampling.NEAREST)
        self.image.paste(strip, (0, start))

    def hill(self, rng: Rng, y: float, swell: float, top: Colour, bottom: Colour, waves: float = 1.0) -> None:
        """Everything below a gently waving line."""
        x = np.linspace(0, 1, 33)
        a, b = rng.uniform(0, math.tau, 2)
        crest = y - swell * (0.7 * np.sin(math.tau * waves * x + a) + 0.3 * np.sin(math.tau * waves * 2.3 * x + b))
        self.shade(np.concatenate([np.stack([x, crest], axis=1), [(1, 1.01), (0, 1.01)]]), top, bottom)

    def glow(self, x: float, y: float, radius: float, colour: Colour, squash: float = 1.0, strength: int = 255) -> None:
        """A soft light, or in a dark colour a soft shadow."""
        (cx, cy), rx, ry = self.put((x, y)), self.wide(radius), self.wide(radius * squash)
        mask = halo(strength).resize((2 * rx, 2 * ry), Image.Resampling.BILINEAR)
        self.image.paste(mix(colour), (round(cx) - rx, round(cy) - ry), mask)

    def sketch(self, sketch: str, pose: float = 0.0, **paints: Colour) -> None:
        """A sketch in the current frame, which must have y upwards; paints name further colours."""
        paints = self.paints | paints
        for stroke in parse(sketch)[0]:
            colour = None if stroke.paint == "skin" else paints.get(stroke.paint, stroke.paint)
            for side in stroke.sides:
                points = stroke.points(pose * side) * (side / 100, 0.01)
                if stroke.solid or colour is None:
                    self.part(points, colour, stroke.solid)
                else:
                    self.flat(points, colour)

    def prop(self, sketch: str, x: float, y: float, height: float, flip: bool = False, **paints: Colour) -> None:
        """A sketch standing at (x, y) of a place."""
        with self.frame(x, y, height, sx=-1 if flip else 1, sy=-1):
            self.sketch(sketch, **paints)

    def wear(self, colours: Sequence[str], pattern: str) -> None:
        """Make the subject's skin in the current frame: one colour, or two for a left and a right half."""
        reach = self.put(((-0.75, -0.06), (0.75, -0.06), (0.75, 1.15), (-0.75, 1.15)))
        left, top, right, bottom = self._box(reach)
        x = np.arange(left, right, dtype=np.float32) - np.float32(self.origin[0])
        y = np.arange(top, bottom, dtype=np.float32)[:, None] - np.float32(self.origin[1])
        u, v = (row[0] * x + row[1] * y for row in np.linalg.inv(self.matrix).astype(np.float32))
        # A palette index: 1 for the pattern, 2 for the right half, 4 for every step of light from top to bottom.
        index = PATTERNS[pattern](u, v).astype(np.uint8)
        if len(colours) > 1:
            index += 2 * (u > 0).astype(np.uint8)
        index += 4 * ((1.1 - v) * 14).clip(0, 15).astype(np.uint8)
        tints = [mix(colour) for name in colours for colour in COLOURS[name]]
        ink, trim = mix(tints[0], INK, 0.72), mix(tints[0], tints[1], 0.6)
        self.paints |= {"ink": ink, "trim": trim, "ear": mix(ink, trim, 0.3), "roof": mix(ink, "#e05a45", 0.75)}
        lights, darks = ([mix(tint, to, t) for tint in (tints * 2)[:4]] for to, t in (("#ffffff", 0.1), (SHADE, 0.14)))
        fall = [mix(*pair, level / 15) for level in range(16) for pair in zip(lights, darks, strict=True)]
        for skin, shade in zip(self.skin, (0.0, 0.24), strict=True):
            patch = Image.fromarray(index)
            patch.putpalette([value for colour in fall for value in mix(colour, SHADE, shade)])
            skin.paste(patch.convert("RGB"), (left, top))


# --- places ----------------------------------------------------------------------------------------------------------

CLOUD = """
    fill shadow oval -50 -1 30 24
    fill shadow oval 25 -4 36 29
    fill shadow oval 58 -12 24 19
    fill tint oval -50 5 30 24
    fill tint oval -15 16 40 32
    fill tint oval 25 7 36 29
    fill tint oval 58 -4 24 19"""
PINE = """
    fill #5c4030 panel -4 0 4 20 1
    fill tint soft 1 -30 10 30 10 0 56
    fill shadow soft 1 6 10 30 10 0 56
    fill tint soft 1 -24 36 24 36 0 80
    fill shadow soft 1 5 36 24 36 0 80
    fill tint soft 1 -17 62 17 62 0 100
    fill shadow soft 1 4 62 17 62 0 100"""
SNOWCAP = """
    fill #fbfdff soft 1 0 58 -13 33 -5 35 3 31 13 34
    fill #fbfdff soft 1 0 82 -12 57 -4 60 4 55 12 58
    fill #fbfdff soft 1 0 100 -9 78 -3 81 3 77 9 79"""
PALM = """
    fill #8d6239 tube 0 0 8 60 -13 100 8 5
    fill #2f9a4c tube -13 100 -35 115 -50 88 11 1
    fill #43b85a tube -13 100 -30 128 -42 113 11 1
    fill #2f9a4c tube -13 100 10 118 24 90 11 1
    fill #43b85a tube -13 100 8 130 16 116 11 1
    fill #2f9a4c tube -13 100 -22 90 -22 72 10 1
    fill #6b4426 oval -15 96 4"""
CACTUS = """
    both fill #3f8a4d tube 0 42+6p 42 40 30 75 14
    fill #4da35a tube 0 0 0 50 0 89 22
    fill #2f7440 panel 3 6 5.5 92 1
    fill #2f7440 panel -5 6 -3 92 1"""
FLOWER = """
    fill tint bloom 0 0 160 5
    fill #ffd84a oval 0 0 55"""
TUFT = """
    fill tint soft 1 -13 0 13 0 0 110
    both fill tint soft 1 0 0 20 0 60 80"""
JAR = """
    part tint panel -34 0 34 86 12
    fill cream panel -22 26 22 56 4
    part #fff6e4 panel -28 84 28 104 4"""
CORAL = """
    fill tint tube 0 0 0 50 0 96 24
    both fill tint tube 0 8 36 24 44 70 20"""
WINDOW = """
    part white panel -45 0 45 100 3
    fill #8fcff5 panel -38 7 38 93 2
    fill #c9e9fa soft 2 -38 7 38 7 38 50 -38 20
    fill white panel -3 5 3 95 1
    fill white panel -40 50 40 56 1
    both part tint soft 14 62 112 22 112 38 40 34 -14 62 -14"""
LAMP = """
    fill #5c4636 panel -2 0 2 76 1
    fill #5c4636 oval 0 1 12 3
    part #f7b94a soft 3 -17 72 17 72 10 100 -10 100"""
EARTH = """
    part #3f8fe0 oval 0 0 100
    fill #5fbf6a blob -70 40 -20 75 10 40 -20 -5 -60 5
    fill #5fbf6a blob 20 0 70 10 50 -60 15 -35
    fill #ffffff99 tube -60 -40 -20 -60 30 -70 14"""
STARFISH = "part #f2705c star 0 0 100 5 45 30"


def scatter(rng: Rng, count: int, *ranges: tuple[float, float]) -> Iterator[tuple[float, ...]]:
    """Random values, one from every range, `count` times."""
    return zip(*(rng.uniform(*limits, count).tolist() for limits in ranges), strict=True)


def cloud(p: Pen, x: float, y: float, size: float, tint: Colour = "#ffffff", shadow: Colour = "#d5e4f2") -> None:
    p.prop(CLOUD, x, y, size, tint=tint, shadow=shadow)


def pine(p: Pen, x: float, y: float, height: float, tint: Colour) -> None:
    p.prop(PINE, x, y, height, tint=tint, shadow=mix(tint, "#10203c", 0.25))


def stars(p: Pen, rng: Rng, count: int) -> None:
    for x, y, r in scatter(rng, count, (0, 1), (0, 0.62), (0.003, 0.009)):
        p.dot(x, y, r, "#fff8dc")


def beach(p: Pen, rng: Rng) -> Iterator[None]:
    sea, side = rng.uniform(0.42, 0.5), rng.choice([-1, 1])
    p.sky("#3fa4ea", "#a5dcf6", "#e9f7f2", bottom=sea)
    p.glow(0.5 - side * 0.3, 0.14, 0.24, "#fff6c4")
    p.dot(0.5 - side * 0.3, 0.14, 0.065, "#fff3a8")
    cloud(p, 0.5 + side * rng.uniform(-0.1, 0.1), rng.uniform(0.1, 0.25), 0.15)
    p.sky("#1479bd", "#26a8cf", "#7fe0d4", top=sea, bottom=sea + 0.25)
    for x, y in scatter(rng, 9, (0, 1), (sea + 0.02, sea + 0.13)):
        p.line(((x - 0.03, y), (x + 0.03, y)), 0.007, "#b9f0ee")
    p.hill(rng, sea + 0.18, 0.015, "#ffffff", "#ffffff")
    p.hill(rng, sea + 0.2, 0.015, "#fbe3a4", "#dba95e")
    p.prop(PALM, 0.5 + side * 0.4, sea + 0.28, sea + 0.1, side < 0)
    for x, y in scatter(rng, 12, (0, 1), (sea + 0.3, 1)):
        p.dot(x, y, 0.007, "#c8934d")
    yield
    p.prop(STARFISH, rng.uniform(0.08, 0.92), 0.94, 0.055)


def snow(p: Pen, rng: Rng) -> Iterator[None]:
    p.sky("#8fb7e0", "#cfe3f5", "#eef5fb")
    p.hill(rng, 0.52, 0.05, "#c9dcf0", "#dfeaf6")
    for x in (0.07, 0.24, 0.78, 0.95):
        x, height = x + rng.uniform(-0.05, 0.05), rng.uniform(0.26, 0.44)
        pine(p, x, 0.66, height, "#2f6f62")
        p.prop(SNOWCAP, x, 0.66, height)
    p.hill(rng, 0.64, 0.03, "#ffffff", "#c6d8ee")
    p.hill(rng, 0.88, 0.02, "#f4f9ff", "#d3e2f3")
    yield
    for x, y, r in scatter(rng, 34, (0, 1), (0, 1), (0.006, 0.014)):
        p.dot(x, y, r, "#ffffff")


def forest(p: Pen, rng: Rng) -> Iterator[None]:
    p.sky("#cfe88a", "#8cc56c", "#4b8f4f")
    p.glow(rng.uniform(0.3, 0.7), 0.25, 0.4, "#f6ffc0")
    trunks = [(x / 7 + 0.07, 0.03, "#7a9055") for x in range(7)] + [(x / 5 + 0.1, 0.055, "#655034") for x in range(5)]
    for x, w, bark in [*trunks, (0.04, 0.075, "#4e341d"), (0.96, 0.075, "#4e341d")]:
        x += rng.uniform(-0.05, 0.05)
        p.flat(((x - w, 0.76), (x - w * 0.6, 0), (x + w * 0.6, 0), (x + w, 0.76)), bark)
        p.flat(((x + w * 0.3, 0.76), (x + w * 0.2, 0), (x + w * 0.6, 0), (x + w, 0.76)), mix(bark, INK, 0.25))
    for row, tint in ((0.02, "#1f5a35"), (-0.03, "#2d7a41")):
        for x in range(7):
            p.dot(x / 6 + rng.uniform(-0.05, 0.05), row, 0.14, tint, 0.75)
    p.hill(rng, 0.7, 0.02, "#5d9a3e", "#2a5a2c")
    for x, y in scatter(rng, 8, (0, 1), (0.74, 0.84)):
        p.prop(TUFT, x, y, 0.06, tint="#3d7a34")
    yield
    for x, height in scatter(rng, 9, (0, 1), (0.07, 0.13)):
        p.prop(TUFT, x, 1.01, height, tint="#1f4d2a")


def night(p: Pen, rng: Rng) -> Iterator[None]:
    p.sky("#0b1036", "#1d2a66", "#4a4a94")
    stars(p, rng, 34)
    x = rng.choice([0.18, 0.82]) + rng.uniform(-0.07, 0.07)
    p.glow(x, 0.18, 0.26, "#8f97d8")
    p.dot(x, 0.18, 0.1, "#fdf2b8")
    for dx, dy, r in ((-0.03, -0.02, 0.022), (0.035, 0.025, 0.016), (0.0, 0.05, 0.012)):
        p.dot(x + dx, 0.18 + dy, r, "#e5d48c")
    p.hill(rng, 0.58, 0.06, "#27306b", "#232a5c")
    p.hill(rng, 0.68, 0.03, "#1d2c55", "#101a38", 0.7)
    for x, y in scatter(rng, 7, (0, 1), (0.6, 0.95)):
        p.glow(x, y, 0.035, "#f8f07a")
        p.dot(x, y, 0.009, "#fdfbc0")
    yield
    p.slab(0, 0, 1, 1, "#141d662a")


def city(p: Pen, rng: Rng) -> Iterator[None]:
    p.sky("#7fb2e5", "#c9dcf0", "#fbe3cf")
    cloud(p, rng.uniform(0.2, 0.8), rng.uniform(0.08, 0.16), 0.14)
    for count, low, high, fade in ((7, 0.12, 0.4, 0.55), (5, 0.28, 0.56, 0.0)):
        x = 0.0
        for width in rng.dirichlet([12.0] * count):
            top, tint = rng.uniform(low, high), rng.choice(["#c96f5a", "#d9a066", "#8b8fb0", "#6f87a8", "#b5838d"])
            wall = mix(str(tint), "#b9cbe3", fade)
            p.slab(x, top, x + width, 0.8, wall)
            p.slab(x + width * 0.8, top, x + width, 0.8, mix(wall, SHADE, 0.2))
            for y in np.arange(top + 0.035, 0.66, 0.075):
                for left in (x + width * 0.15, x + width * 0.47):
                    p.slab(left, y, left + width * 0.2, y + 0.04, mix("#fff2b0", wall, fade))
            x += width
    p.sky("#b9b6bd", "#a4a1ab", top=0.7, bottom=0.77)
    p.sky("#5b5d6b", "#3e404e", top=0.77)
    for x in np.arange(-0.2, 1.1, 0.27) + rng.uniform(0, 0.2):
        p.flat(((x, 0.9), (x + 0.14, 0.9), (x + 0.13, 0.925), (x - 0.01, 0.925)), "#f4e9b8")
    yield


def desert(p: Pen, rng: Rng) -> Iterator[None]:
    p.sky("#f2a65a", "#fbd38a", "#fdecc0")
    x = rng.uniform(0.2, 0.8)
    p.glow(x, 0.2, 0.3, "#fff8d8")
    p.dot(x, 0.2, 0.095, "#fffbe8")
    for x, w, h in ((rng.uniform(0.0, 0.3), 0.17, 0.2), (rng.uniform(0.7, 1.0), 0.2, 0.14)):
        p.shade(((x - w, 0.62), (x - w * 0.7, 0.58 - h), (x + w * 0.7, 0.58 - h), (x + w, 0.62)), "#c4623f", "#dc8a5a")
    p.hill(rng, 0.58, 0.035, "#eeb160", "#d98c45", 0.8)
    for x in (rng.uniform(0.04, 0.16), rng.uniform(0.86, 0.96)):
        p.prop(CACTUS, x, 0.72, rng.uniform(0.2, 0.34))
    p.hill(rng, 0.7, 0.03, "#f4c173", "#cf8340", 0.8)
    x = np.linspace(0, 1, 17)
    for y in (0.82, 0.9, 0.97):
        p.line(np.stack([x, y + 0.012 * np.sin(9 * x + rng.uniform(0, 6))], axis=1), 0.007, "#dd9a52")
    yield


def table(p: Pen, rng: Rng) -> Iterator[None]:
    wall, cloth = str(rng.choice(["#8fc9b4", "#f0b79a", "#9db9e4"])), str(rng.choice(["#e8505b", "#4a86d8", "#f2a33a"]))
    p.sky(mix(wall, "#ffffff", 0.35), wall)
    for at in np.arange(0.06, 1, 0.13):
        p.slab(0, at, 1, at + 0.006, mix(wall, "#ffffff", 0.5))
        p.slab(at, 0, at + 0.006, 1, mix(wall, "#ffffff", 0.5))
    shelf, y = 0.5 + rng.choice([-0.3, 0.3]), rng.uniform(0.2, 0.26)
    p.part(panel(shelf - 0.24, y, shelf + 0.24, y + 0.03, 0.005), "#a56a3c")
    for i, tint in enumerate(rng.permutation(["#f2c14e", "#e07a5f", "#81b29a", "#b08bd0"])[:3].tolist()):
        p.prop(JAR, shelf + 0.15 * (i - 1), y - 0.012, 0.13, tint=tint)
    p.sky("#fffaf2", "#f1e6d8", top=0.62)
    for x in np.arange(-3.0, 3.1, 0.3):
        corners = ((x, 0.55, 0.62), (x + 0.15, 0.55, 0.62), (x + 0.15, 1, 1), (x, 1, 1))
        p.flat([(0.5 + across * spread, y) for across, spread, y in corners], cloth + "96")
    for top, bottom in ((0.65, 0.685), (0.725, 0.77), (0.82, 0.875), (0.935, 1.0)):
        p.slab(0, top, 1, bottom, cloth + "96")
    p.slab(0, 0.61, 1, 0.625, mix(cloth, SHADE, 0.2))
    yield


def water(p: Pen, rng: Rng) -> Iterator[None]:
    p.sky("#7fe3ec", "#2aa5d0", "#12609f")
    for (x,) in scatter(rng, 4, (0, 1)):
        p.flat(((x, 0), (x + 0.09, 0), (x - 0.12, 0.85), (x - 0.32, 0.85)), "#ffffff22")
    p.hill(rng, 0.74, 0.03, "#2f86a8", "#1f6a90")
    for x in (0.06, 0.15, 0.85, 0.94):
        height, lean = rng.uniform(0.28, 0.5), rng.uniform(-0.07, 0.07)
        weed = tube(x, 0.86, x + lean * 2, 0.86 - height / 2, x - lean, 0.86 - height, 0.05, 0.012)
        p.flat(weed, "#1f9a6a" if lean > 0 else "#2fb877")
    p.hill(rng, 0.82, 0.02, "#ecd9a0", "#b99f6a")
    p.prop(CORAL, rng.choice([0.1, 0.9]), 0.9, rng.uniform(0.13, 0.18), tint="#f2718a")
    yield
    p.slab(0, 0, 1, 1, "#1fa0d824")
    for x, y, r in scatter(rng, 11, (0, 1), (0.05, 0.8), (0.01, 0.028)):
        p.dot(x, y, r, "#e6fbff96")
        p.dot(x, y, r * 0.72, "#5fc4e2aa")
        p.dot(x - r * 0.3, y - r * 0.3, r * 0.25, "#ffffff")


def mountains(p: Pen, rng: Rng) -> Iterator[None]:
    p.sky("#5b9be0", "#b5d9f5", "#eaf4fb")
    cloud(p, rng.uniform(0.1, 0.9), rng.uniform(0.08, 0.2), 0.13)
    for x, top in ((0.16, rng.uniform(0.18, 0.32)), (0.84, rng.uniform(0.18, 0.32)), (0.5, rng.uniform(0.1, 0.22))):
        x, h = x + rng.uniform(-0.08, 0.08), 0.7 - top
        w = h * 0.68
        p.shade(((x - w, 0.7), (x, top), (x + w, 0.7)), "#7d8fb5", "#a9bcd6")
        p.flat(((x, top), (x + w, 0.7), (x + w * 0.15, 0.7), (x + w * 0.08, top + h / 2)), "#5f7199")
        rim = ((0, 0), (0.36, 0.36), (0.18, 0.29), (0.04, 0.41), (-0.14, 0.27), (-0.36, 0.36))
        p.flat([(x + w * across, top + h * down) for across, down in rim], "#fbfdff")
    p.hill(rng, 0.64, 0.02, "#4f8f6a", "#3d7a58")
    for i in range(10):
        pine(p, i / 9 + rng.uniform(-0.03, 0.03), 0.73, rng.uniform(0.1, 0.17), "#2c6a4c")
    p.hill(rng, 0.71, 0.015, "#7fb35f", "#4c8748")
    for x, y in scatter(rng, 4, (0, 1), (0.78, 0.96)):
        p.part(oval(x, y, 0.04, 0.022), "#a3a7ad", edge=False)
    yield


def meadow(p: Pen, rng: Rng) -> Iterator[None]:
    p.sky("#58b4f0", "#bfe6fa", "#f3fbe6")
    for x in (rng.uniform(0.05, 0.4), rng.uniform(0.6, 0.95)):
        cloud(p, x, rng.uniform(0.1, 0.25), rng.uniform(0.12, 0.18))
    p.hill(rng, 0.54, 0.05, "#a9dc7a", "#86c75f")
    p.hill(rng, 0.62, 0.03, "#86d05c", "#4fa548")
    petals = ("#ff6f91", "#ffffff", "#ffb347", "#c77dff", "#ff5252")
    for i, (x, y) in enumerate(sorted(scatter(rng, 22, (0, 1), (0.66, 0.95)), key=lambda at: at[1])):
        p.prop(FLOWER, x, y, 0.05 * (y - 0.45), tint=petals[i % 5])
    yield
    for x, tint in zip((0.05, 0.14, 0.86, 0.95, rng.uniform(0.2, 0.8)), petals, strict=True):
        p.prop(TUFT, x, 1.01, 0.09, tint="#3c8f3d")
        p.prop(FLOWER, x + rng.uniform(-0.02, 0.02), rng.uniform(0.9, 0.96), 0.036, tint=tint)


def rain(p: Pen, rng: Rng) -> Iterator[None]:
    p.sky("#56657c", "#8494a8", "#b4c0c8")
    p.hill(rng, 0.56, 0.04, "#7d9089", "#6a8078")
    p.hill(rng, 0.66, 0.02, "#6f8d70", "#4a6a5a")
    for x in (0.0, 0.33, 0.66, 1.0):
        cloud(p, x + rng.uniform(-0.08, 0.08), rng.uniform(0.02, 0.1), 0.26, "#76849a", "#4c5a70")
    for x, y in ((0.17, 0.78), (0.83, 0.84), (0.5, 0.95)):
        x += rng.uniform(-0.13, 0.13)
        p.dot(x, y, 0.15, "#8fb0c6", 0.22)
        p.dot(x - 0.01, y - 0.005, 0.1, "#b9d3e2", 0.2)
    yield
    for x, y in scatter(rng, 30, (0, 1.1), (-0.05, 0.95)):
        p.line(((x, y), (x - 0.025, y + 0.085)), 0.009, "#d9ecffbe")


def moon(p: Pen, rng: Rng) -> Iterator[None]:
    p.sky("#07060f", "#15132b", "#2a2748")
    stars(p, rng, 45)
    x, y = rng.choice([0.18, 0.82]) + rng.uniform(-0.05, 0.05), rng.uniform(0.15, 0.25)
    p.glow(x, y, 0.2, "#3a6fb5")
    p.prop(EARTH, x, y, 0.11)
    p.hill(rng, 0.6, 0.04, "#8d8c9a", "#77768a", 1.4)
    p.hill(rng, 0.67, 0.02, "#cfced6", "#8b8a9c", 0.7)
    for x, y in ((0.08, 0.76), (0.3, 0.9), (0.62, 0.95), (0.9, 0.8), (0.2, 0.98), (0.75, 0.72)):
        x, r = x + rng.uniform(-0.06, 0.06), rng.uniform(0.04, 0.09)
        p.dot(x, y, r, "#e6e5ec", 0.36)
        p.dot(x + 0.006, y + 0.008, r * 0.86, "#7d7c90", 0.34)
    yield


def room(p: Pen, rng: Rng) -> Iterator[None]:
    wall, rug = str(rng.choice(["#f2d6a2", "#e8c4b8", "#c3d6b0"])), str(rng.choice(["#b5485a", "#4a6fa5", "#6a4c93"]))
    p.sky(mix(wall, "#ffffff", 0.3), wall, bottom=0.68)
    side = rng.choice([-1, 1])
    p.prop(WINDOW, 0.5 - side * rng.uniform(0.24, 0.3), 0.44, 0.36, tint=rug)
    p.glow(0.5 + side * 0.4, 0.3, 0.22, "#fff4c0")
    p.prop(LAMP, 0.5 + side * 0.4, 0.74, 0.52)
    p.sky("#b07a4a", "#d19c66", top=0.68)
    p.sky("#fff8ea", "#e8dcc8", top=0.66, bottom=0.69)
    for slope in np.arange(-1.5, 1.6, 0.3):
        p.line(((0.5 + slope * 0.8, 0.69), (0.5 + slope * 1.4, 1.0)), 0.005, "#94622f")
    for radius, tint in ((0.44, rug), (0.38, mix(rug, "#ffffff", 0.5)), (0.35, rug)):
        p.dot(0.5, 0.88, radius, tint, 0.24)
    yield


def sunset(p: Pen, rng: Rng) -> Iterator[None]:
    p.sky("#4b2a7b", "#c4447e", "#fb8a4c", "#ffd36b", bottom=0.6)
    x = rng.uniform(0.25, 0.75)
    p.glow(x, 0.56, 0.42, "#ffe48a")
    p.dot(x, 0.56, 0.15, "#fff0a0")
    for left, y, w in scatter(rng, 4, (0, 1), (0.1, 0.4), (0.1, 0.2)):
        p.dot(left, y, w, "#f58a8a", 0.09)
    p.sky("#e8686a", "#7a3a86", "#4a2a70", top=0.6)
    for i, (dx, w) in enumerate(scatter(rng, 6, (-0.03, 0.03), (0.06, 0.16))):
        p.dot(x + dx, 0.62 + 0.03 * i, w, "#ffd98a", 0.07)
    p.hill(rng, 0.76, 0.02, "#5a2f5c", "#2c1838")
    yield
    p.slab(0, 0, 1, 1, "#ff7a3c16")


def clouds(p: Pen, rng: Rng) -> Iterator[None]:
    p.sky("#3d8fe8", "#8cc8f8", "#d3ecfd")
    x = rng.uniform(0.3, 0.7)
    for i, tint in enumerate(("#f25c5c", "#fba94c", "#fbe45c", "#6cc96c", "#5c9cf2", "#9a6ce0")):
        r = 0.58 - i * 0.032
        box = p.put(((x - r, 0.72 - r), (x + r, 0.72 + r))).ravel().tolist()
        p.draw.arc(box, 180, 360, fill=tint, width=p.wide(0.034))
    for y, tint in ((0.74, "#dcebfa"), (0.86, "#eef6fe")):
        for i in range(6):
            p.dot(0.2 * i + rng.uniform(-0.06, 0.06), y + rng.uniform(-0.02, 0.02), 0.16, tint, 0.72)
    p.sky("#eef6fe", "#c9dff5", top=0.88)
    yield
    for i in range(5):
        p.dot(0.24 * i + rng.uniform(-0.06, 0.06), 1.02, 0.12, "#ffffff", 0.75)


class Place(NamedTuple):
    """The words of a caption, and the drawing."""

    words: str
    draw: Callable[[Pen, Rng], Iterator[None]]


PLACES: dict[str, Place] = {
    "beach": Place("on the beach", beach),
    "snow": Place("in the snow", snow),
    "forest": Place("in the forest", forest),
    "night": Place("at night", night),
    "city": Place("in the city", city),
    "desert": Place("in the desert", desert),
    "table": Place("on a table", table),
    "water": Place("under water", water),
    "mountains": Place("in the mountains", mountains),
    "meadow": Place("in a meadow", meadow),
    "rain": Place("in the rain", rain),
    "moon": Place("on the moon", moon),
    "room": Place("in a room", room),
    "sunset": Place("at sunset", sunset),
    "clouds": Place("in the clouds", clouds),
}

# --- classes: facing right; `span` is the half width of the shadow and the height ------------------------------------

CLASSES: dict[str, str] = {
    "robot": """
        at span 50 100  head 0 90 46  eyes 0 77.5 36  neck 0 58.5 40  hand -42 40 100  chest 0 38.5 14.5  tip 0 102 12
        both part metal tube 25 50 42 48 42 42+25p 8.5
        both part skin oval 42 41+27p 6.2
        both part metal panel 7.5 4 18.5 25 2
        both part skin panel 4 0 24 8.5 5
        part metal panel -8 52 8 64 1
        fill dark panel -1.4 90 1.4 99 0.5
        part #ff5a4d oval 0 100 4.2
        both part metal panel 20 68 28 82 2
        part skin panel -27 20 27 57 7
        part skin panel -23 61 23 91 8
        part dark panel -17.5 66 17.5 85 6
        both fill #7df3ff oval 8.5 77.5 4.4
        both fill white oval 7.3 79 1.6
        both fill ink oval 22.5 24.5 1.4
        both fill ink oval 22.5 52.5 1.4
        fill #7df3ff panel -5 69 5 71 1""",
    "cat": """
        at span 50 100  head 0 90 44  eyes 0 72 46  neck 0 47 46  hand -28 30 100  chest 0 30 14  tip -27 98 15
        part skin tube 18 8 52 2 42+6p 42+6p 10 7.5
        part skin blob -30 -3 30 -3 34 25 16 62 -16 62 -34 25
        both part skin oval 11 4.5 9.5 5.5
        both part skin soft 5 30 66 31 102 5 86
        both fill rose soft 3 26 75 27.5 94 12 85
        part skin oval 0 69 32 23.5
        fill cream oval 0 61 12 8
        both fill #fdfff0 oval 14 72 6
        both fill pupil oval 14+1.2p 72 4.2
        fill white oval 15+1.2p 73.5 1.7
        fill white oval -13+1.2p 73.5 1.7
        both fill #d6cdcd tube 17 61.5 26 62 36 64 1
        both fill #d6cdcd tube 17 60 26 59.5 36 58.5 1
        fill #e0587a soft 1 -3.5 65 3.5 65 0 61
        both fill pupil tube 0 61 3 57 6 60 1.3""",
    "dog": """
        at span 56 96  head 26 95 40  eyes 40 78.5 34  neck 27 47 40 17  hand -30 56 100  chest -12 40 14  tip -50 75 13
        part skin tube -36 42 -50 50 -52+5p 72 8.5 5
        part skin tube -24 30 -24 15 -24-5p 4 11.5
        part skin oval -21.5-5p 4 8 4.5
        part skin tube 22 30 22 15 22+5p 4 11.5
        part skin oval 24.5+5p 4 8 4.5
        part skin tube -34 30 -34 15 -34+5p 4 11.5
        part skin oval -31.5+5p 4 8 4.5
        part skin tube 12 30 12 15 12-5p 4 11.5
        part skin oval 14.5-5p 4 8 4.5
        part skin blob -46 20 32 20 36 56 -10 54 -46 58
        part skin blob 5 50 36 40 52 60 50 96 8 96
        part cream oval 44 62 15 10.5
        fill dark oval 55 67.5 5 4
        fill pupil tube 40 58 47 54 53 58.5 1.6
        fill pupil oval 39 78.5 4.5
        fill white oval 40 80 1.8
        part ear blob 2 95 20 95 22 56 6 50 -3 64""",
    "bird": """
        at span 62 92  head 25 94 36  eyes 28 76 36  neck 17 55 46  hand -30 60 100  chest 20 34 12  tip 20 102 14
        fill #c46a1a panel -7.6 1 -4.4 22 1
        fill #c46a1a panel -11 0 3 3 1
        fill #c46a1a panel 8.4 1 11.6 22 1
        fill #c46a1a panel 5 0 19 3 1
        part skin soft 6 -20 50 -62 46 -58 30 -15 24
        part #ffae2b soft 3 38 76 64 66 38 60
        part skin blob -34 20 14 6 42 30 48 86 26 100 -2 86 -20 56
        fill cream blob 8 14 38 24 36 54 20 52
        part skin blob 14 52 -2 62 -40 40+32p -42 22+32p -4 22
        fill white oval 27 76 7.5
        fill pupil oval 28.5 76 5
        fill white oval 29.5 77.8 2
        fill cheek oval 20 64 3.5""",
    "fish": """
        at span 64 95  head 12 75 40  eyes 33 54 32  neck 14 42 60 86  hand -10 72 100  chest -5 46 14  tip 5 95 13
        part skin soft 7 -30 44 -64 72+5p -56 44 -64 16+5p
        part trim soft 8 -20 66 -8 92 20 86 20 66
        part trim soft 5 -5 20 -16 3 8 10 12 22
        part skin blob -46 44 -20 72 20 80 56 56 56 36 20 8 -20 16
        part trim soft 6 2 46 -16 50+8p -16 28+8p 0 34
        fill white oval 32 54 8.2
        fill pupil oval 33.5 54 5.4
        fill white oval 34.6 56 2.2
        fill cheek oval 26 37 4.5
        fill pupil tube 37 38 43 33 49 39 2""",
    "car": """
        at span 66 98  head -7 64 42  eyes 0 49 46  neck -7 38.5 66  hand -50 41 100  chest -3 25 12  tip -7 76 16
        part skin soft 10 -36 34 -28 66 14 66 34 34
        part glass soft 3 -27 37 -22 60 -6 60 -6 37
        part glass soft 3 0 37 0 60 12 60 25 37
        part skin soft 8 -60 10 62 10 63 30 38 41 -56 41 -61 30
        part #fff2a0 panel 52 24 63 33 4
        fill #ff6a5a panel -62 25 -56 33 2
        part metal panel -66 8 67 14.5 3
        fill ink panel -3 33 5 35 1
        part #3a3a48 oval -34 13 14
        fill #d9dee8 oval -34 13 7.6
        fill #8a93a6 star -34 13 7 5 2.5 0.5
        part #3a3a48 oval 36 13 14
        fill #d9dee8 oval 36 13 7.6
        fill #8a93a6 star 36 13 7 5 2.5 0.5""",
    "rocket": """
        at span 40 96  head 0 96 32  eyes 0 62 42  neck 0 43 54  hand -26 50 100  chest 0 34 12  tip 0 106 12
        both fill #f4f1eed8 oval 20 4 10 7
        fill #f4f1eed8 oval 0 2 12 8
        part #ff8a2a soft 4 -10 20 0 -2-5p 10 20
        fill #ffe25c soft 3 -5 20 0 6-5p 5 20
        both part trim soft 5 14 46 36 26 36 6 14 20
        part skin blob -17 16 17 16 27 50 20 84 0 112 -20 84 -27 50
        part trim soft 3 -16.5 83 16.5 83 6 98 0 102 -6 98
        part metal oval 0 62 12.5
        fill #8fdcf7 oval 0 62 8.5
        fill white oval -3 65 2.2
        part metal panel -14 14 14 20 2""",
    "house": """
        at span 55 92  head 0 93 42  eyes 0 33 60  neck 0 53 82  hand -42 50 100  chest 0 72 13  tip 0 104 14
        part #b5654a panel 17 70 30 100 1
        fill #ffffffaa oval 24 106 4
        fill #ffffff8c oval 29+5p 113.5 5.2
        fill #ffffff6e oval 34+10p 121 6.4
        part skin panel -40 0 40 60 2
        part roof soft 5 -52 55 0 100 52 55
        part #fff3b8 oval 0 72 7.5
        part wood soft 7 -10 0 10 0 10 36 -10 36
        fill gold oval 6 17 1.8
        both part #fff3b8 panel 16.5 24 33.5 42 1
        both fill wood panel 24.1 24 25.9 42 0.5
        both fill wood panel 17 32.1 33 33.9 0.5""",
    "tree": """
        at span 52 95  head 0 102 42  eyes 0 68 46  neck 0 40 30  hand -42 50 100  chest 0 62 15  tip 30 86 14
        part wood soft 5 -16 -2 16 -2 8.5 16 10 50 -10 50 -8.5 16
        both part skin oval 27+3p 52 23
        part skin oval 0+3p 84 25
        part skin oval -20+6p 72 22
        part skin oval 20+6p 72 22
        fill skin oval 0+3p 60 30 24""",
    "mushroom": """
        at span 56 95  head 0 100 42  eyes 0 26 34  neck 0 11 44  hand -50 50 100  chest 0 74 16  tip 30 100 14
        part cream soft 14 -20 -3 20 -3 24 16 15 50 -15 50 -24 16
        part skin blob -56 38 56 38 52 78 20 106 -20 106 -52 78
        part #e9cfae oval 0 45 38 4.5
        both fill pupil oval 8.5+2p 26 3.4
        fill white oval 9.2+2p 27.3 1.4
        fill white oval -7.8+2p 27.3 1.4
        both fill cheek oval 15+2p 19 3
        fill pupil tube -4+2p 20 0+2p 15.5 4+2p 20 1.6""",
    "cup": """
        at span 56 93  head -5 76 46  eyes 0 50 50  neck 0 28 70  hand -36 50 100  chest -2 38 16  tip 32 82 14
        part #f2ede4 oval 0 6 50 6.5
        part trim tube 34 65 102 54 24 20 10
        part skin soft 14 -40 74 40 74 36 30 22 5 -22 5 -36 30
        part skin oval 0 72 40 9
        fill #6b3f22 oval 0 71.5 34 6.2
        fill #ffffff82 tube -15 76 -12+9p 86 -15 98 4 1.5
        fill #ffffff82 tube 0 76 3+9p 86 0 98 4 1.5
        fill #ffffff82 tube 15 76 18+9p 86 15 98 4 1.5""",
}

# --- accessories: one unit wide, in a frame at the anchor ------------------------------------------------------------


class Accessory(NamedTuple):
    """The words of a caption, the anchor, and the sketch."""

    words: str = ""
    anchor: str = "head"
    sketch: str = ""


HAT = """
    part #d8232f soft 14 -36 2 -30 56 30 56 36 2
    fill #fff0d0 soft 2 -36 6 -34.5 20 34.5 20 36 6
    part #d8232f oval 0 3 62 10"""
SCARF = """
    part #2a5fd8 soft 5 18 2 42 2 46 -54 20 -54
    fill #cfe2ff panel 20.5 -42 44 -34 1
    part #3f79f0 soft 9 -56 8 0 0 56 8 56 -12 0 -22 -56 -12
    fill #cfe2ff tube -30 2 -30 -6 -26 -15 6
    fill #cfe2ff tube 0 -3 0 -10 4 -19 6"""
CROWN = """
    part gold soft 4 -44 0 -52 52 -24 28 0 66 24 28 52 52 44 0
    both fill #e0314a oval 27 13 7.5
    fill #3a7be8 oval 0 15 7.5
    both part #fff0a8 oval 52 52 7.5
    part #fff0a8 oval 0 66 7.5"""
GLASSES = """
    fill #17141f panel -56 0 56 8 2
    both fill #17141f oval 27 0 25 22
    both fill #5fd0f0 oval 27 0 17 14.5
    fill #e6fbff tube -36 -3 -30 4 -24 9 5
    fill #e6fbff tube 18 -3 24 4 30 9 5"""
BLOOM = """
    part #ff6fb0 bloom 34 6 37 6
    part #ffd84a oval 34 6 13"""
BOW = """
    both part #b83bd8 soft 9 0 0 50 27 50 -27
    part #8a22ad oval 0 0 13 15"""
BALLOON = """
    fill #f5f2ea tube 0 0 -5 16 -12 32 1.4
    part #f2384c blob -12 29 6 50 3 68 -27 68 -30 50
    part #f2384c soft 1 -12 36 -8 31 -16 31
    fill #ffd9dc oval -19 58 2.2 4"""

ACCESSORIES: dict[str, Accessory] = {
    "none": Accessory(),
    "red hat": Accessory("wearing a red hat", "head", HAT),
    "blue scarf": Accessory("wearing a blue scarf", "neck", SCARF),
    "crown": Accessory("wearing a crown", "head", CROWN),
    "glasses": Accessory("wearing glasses", "eyes", GLASSES),
    "flower": Accessory("wearing a flower", "head", BLOOM),
    "bow tie": Accessory("wearing a bow tie", "neck", BOW),
    "balloon": Accessory("with a balloon", "hand", BALLOON),
}

# What a caption may say of a scene, and the values of each; random scenes depend on the order.
ATTRIBUTES = {"kind": CLASSES, "colour": COLOURS, "pattern": PATTERNS, "accessory": ACCESSORIES, "place": PLACES}

WORN = {  # the room that accessories take at their anchors, and the subject itself, as high as its frame
    "head": (-0.6, -0.3, 0.6, 0.8),
    "eyes": (-0.6, -0.4, 0.6, 0.4),
    "neck": (-0.6, -0.5, 0.6, 0.5),
    "hand": (-0.3, 0.3, 0.1, 0.7),
    "feet": (-0.55, 0.0, 0.55, 1.0),
}

# --- subjects: marks that no word of the captions names --------------------------------------------------------------


class Mark(NamedTuple):
    """What makes a subject one of a kind: two halves, a badge on the chest, an odd part at the tip."""

    kind: str
    halves: tuple[str, str]
    badge: str
    odd: str


STAR_BADGE = """
    part #fff8ea oval 0 0 115
    fill #23306e oval 0 0 95
    part gold star 0 0 80 5 36 10
    fill #e0393e oval 0 0 16"""
BOLT_BADGE = """
    part #fff8ea oval 0 0 115
    fill #3a2a6a oval 0 0 95
    part #ffe14d soft 3 12 68 -40 -8 -4 -8 -12 -68 40 12 4 12"""
HEART_BADGE = """
    part #fff6e4 oval 0 0 115
    part #f23d5c soft 40 0 -60 -60 0 -56 60 0 24 56 60 60 0
    fill #ffd0da oval -24 18 10"""
EYE_BADGE = """
    part #fff8ea oval 0 0 115
    fill #ffd23c oval 0 0 95
    part white soft 40 -80 0 0 60 80 0 0 -60
    fill #7a2fd0 oval 0 0 29
    fill #16101f oval 0 0 13"""
STAR_TIP = """
    part #ff4fa0 star 0 0 100 5 45 12
    fill #fff3a0 star 0 0 50 5 22 6"""
HORN = """
    part #48d6c0 soft 10 -40 -70 50 -70 -15 120
    fill #0f6f70 tube -42 -42 0 -36 44 -20 16
    fill #0f6f70 tube -37 -2 0 4 30 20 16
    fill #0f6f70 tube -30 38 -8 42 14 60 15"""
FLAG = """
    fill dark panel -9 -120 9 110 5
    part #ff4f6d soft 8 0 105 130 65 0 10
    fill white oval 40 62 18"""
KEY = """
    part metal panel -14 -100 14 20 5
    both part gold oval 48 45 46
    both fill #8a5a10 oval 48 45 20"""

SUBJECTS: dict[str, Mark] = {
    "robot": Mark("robot", ("orange", "teal"), STAR_BADGE, STAR_TIP),
    "cat": Mark("cat", ("white", "purple"), BOLT_BADGE, HORN),
    "cup": Mark("cup", ("blue", "yellow"), HEART_BADGE, FLAG),
    "car": Mark("car", ("pink", "green"), EYE_BADGE, KEY),
}
PHOTOGRAPHED = ["meadow", "room", "beach", "city", "snow", "table", "mountains"]  # where pictures of them may be taken

# --- scenes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """Everything one picture shows, as plain values."""

    kind: str
    colour: str
    pattern: str
    accessory: str
    place: str
    x: float = 0.5
    y: float = 0.88
    size: float = 0.6
    pose: float = 0.0
    tilt: float = 0.0
    flip: bool = False
    light: float = 1.0
    warmth: float = 0.0
    seed: int = 0
    marks: str = ""

    @classmethod
    def random(cls, rng: Rng, **fixed: object) -> "Scene":
        """A random scene; keyword arguments fix any of its values. The same rng state gives the same scene."""
        values: dict[str, object] = {name: list(table)[rng.integers(len(table))] for name, table in ATTRIBUTES.items()}
        bare, plain = rng.random(2)
        values["accessory"] = "none" if bare < 0.3 else values["accessory"]
        values["pattern"] = "plain" if plain < 0.2 else values["pattern"]
        ranges = {"x": (0.42, 0.58), "y": (0.84, 0.93), "size": (0.5, 0.7), "pose": (-1, 1), "tilt": (-0.1, 0.1)}
        ranges |= {"light": (0.93, 1.08), "warmth": (-0.05, 0.05)}
        values |= {name: round(float(rng.uniform(*limits)), 4) for name, limits in ranges.items()}
        values |= {"flip": bool(rng.integers(2)), "seed": int(rng.integers(2**31))}
        return cls(**(values | fixed))

    def _anchors(self) -> dict[str, tuple[float, ...]]:
        """Where things go on the subject, as the arguments of `Pen.frame`."""
        anchors = parse(CLASSES[self.kind])[1]
        return {name: (*at[:3], *(math.radians(100 * turn) for turn in at[3:])) for name, at in anchors.items()}

    def _frame(self, pen: Pen) -> AbstractContextManager[None]:
        """The subject's own frame on the canvas."""
        height = self.size * self._anchors()["span"][1]
        return pen.frame(self.x, self.y, height, self.tilt, -1 if self.flip else 1, -1)

    def draw(self, size: int = 64, mark: Mark | None = None) -> np.ndarray:
        """The picture, uint8 [size, size, 3], with other marks if given; drawn larger and averaged down, for smooth edges."""
        over = 3 if size <= 64 else 2
        pen = Pen(size * over)
        anchors, accessory, mark = self._anchors(), ACCESSORIES[self.accessory], mark or SUBJECTS.get(self.marks)
        layers = PLACES[self.place].draw(pen, np.random.default_rng(self.seed))
        next(layers)
        pen.glow(self.x + 0.02, self.y, 1.45 * math.prod(anchors["span"]) * self.size, "#140f2a", 0.2, 200)
        with self._frame(pen):
            pen.wear(mark.halves if mark else [self.colour], self.pattern)
            pen.sketch(CLASSES[self.kind], self.pose)
            marks = (("chest", mark.badge), ("tip", mark.odd)) if mark else ()
            for anchor, sketch in (*marks, (accessory.anchor, accessory.sketch)):
                with pen.frame(*anchors[anchor]):
                    pen.sketch(sketch)
        next(layers, None)
        gains = np.float32([self.light * (1 + self.warmth), self.light, self.light * (1 - self.warmth)])
        return np.clip(np.round(np.asarray(pen.image.reduce(over)) * gains), 0, 255).astype(np.uint8)

    def caption(self, rng: Rng | None = None) -> str:
        """What the picture shows: in full, or (with an rng) with words left out, at times most, and other turns of phrase."""
        talkative = 1.0 if rng is None or rng.random() < 0.7 else 0.35

        def keep(chance: float) -> bool:
            return rng is None or bool(rng.random() < chance * talkative)

        words = [self.kind]
        if self.pattern != "plain" and keep(0.8):
            words.insert(0, self.pattern)
        if keep(0.85):
            words.insert(0, self.colour)
        if rng is not None and self.pattern == "plain" and keep(0.4):
            words.insert(0, "plain")
        if rng is not None and not 0.54 < self.size < 0.66 and keep(0.3):
            words.insert(0, "small" if self.size < 0.6 else "big")
        words.insert(0, "an" if words[0][0] in "aeiou" else "a")
        if self.accessory != "none" and keep(0.85):
            words.append(ACCESSORIES[self.accessory].words)
        if keep(0.85):
            words.append(PLACES[self.place].words)
        return " ".join(["a photo of" if rng is None or rng.random() < 0.8 else "a picture of", *words])

    def _boxes(self, size: int, reach: dict[str, tuple[float, float, float, float]]) -> np.ndarray:
        """Corners [anchors, 4, 2], in pixels, of boxes (left, bottom, right, top) in units of these anchors."""
        pen, anchors = Pen(size), {"feet": (0.0, 0.0, 1.0)} | self._anchors()

        def corners(name: str, left: float, bottom: float, right: float, top: float) -> np.ndarray:
            x, y, unit = anchors[name][:3]
            return pen.put(unit * np.array([(left, bottom), (left, top), (right, top), (right, bottom)]) + (x, y))

        with self._frame(pen):
            return np.stack([corners(name, *box) for name, box in reach.items()])

    def mark_box(self, size: int = 64) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of the subject's badge and odd part, in pixels of a picture of that size."""
        pixels = self._boxes(size, dict.fromkeys(("chest", "tip"), (-1.25, -1.25, 1.25, 1.25))).reshape(-1, 2)
        left, top = np.floor(pixels.min(0)).clip(0, size).astype(int).tolist()
        right, bottom = np.ceil(pixels.max(0)).clip(0, size).astype(int).tolist()
        return left, top, right, bottom

    def emphasis(self, size: int) -> np.ndarray:
        """[size, size] of mean 1, larger on the subject and where things are worn: what a caption says is seen there."""
        weight = np.ones((size, size), np.float32)
        for corners in self._boxes(size, WORN):
            left, top = corners.min(0).round().clip(0, size).astype(int)
            right, bottom = corners.max(0).round().clip(0, size).astype(int)
            weight[top:bottom, left:right] += 2
        return weight / weight.mean()


def subject_scene(name: str, rng: Rng, **fixed: object) -> Scene:
    """A random scene with one of the `SUBJECTS`, bare of accessories and not mirrored unless asked for."""
    mark = SUBJECTS[name]
    looks = {"kind": mark.kind, "colour": mark.halves[0], "pattern": "plain", "accessory": "none", "flip": False}
    scene = Scene.random(rng, **(looks | fixed), marks=name)
    return scene if "size" in fixed else replace(scene, size=round(0.6 + (scene.size - 0.5) * 0.5, 4))


def draw_all(
    scenes: Sequence[Scene], size: int, workers: int | None = None, marks: Iterable[Mark | None] = repeat(None)
) -> np.ndarray:
    """Their pictures, uint8 [N, size, size, 3], by as many processes as there are workers (default: cores)."""
    with ProcessPoolExecutor(workers) as pool:
        return np.stack([*pool.map(Scene.draw, scenes, repeat(size), marks, chunksize=20)])


# --- command line ----------------------------------------------------------------------------------------------------


def write_subjects(out: Path) -> None:
    """Five photographs of every subject, each in another place and pose."""
    for number, name in enumerate(SUBJECTS):
        rng = np.random.default_rng([number, 2])
        for i, place in enumerate(rng.permutation(PHOTOGRAPHED).tolist()[:5]):
            scene = subject_scene(name, rng, place=place, pose=round(-0.9 + 0.45 * i, 2))
            save_png(Image.fromarray(scene.draw(256)), out / name / f"{i:02d}.png", {})


def write_sheet(out: Path) -> None:
    """A contact sheet of random scenes with their captions."""
    columns, rows, cell, line = 8, 6, 192, 14
    sheet = Image.new("RGB", (columns * cell, rows * (cell + line)), "white")
    pen, rng = ImageDraw.Draw(sheet), np.random.default_rng(0)
    for i in range(columns * rows):
        scene = Scene.random(rng)
        x, y = i % columns * cell, i // columns * (cell + line)
        sheet.paste(Image.fromarray(scene.draw(64)).resize((cell, cell), Image.Resampling.NEAREST), (x, y))
        pen.text((x + 2, y + cell + 1), scene.caption(rng).partition(" of ")[2][: cell // 6], fill="black")
    save_png(sheet, out, {})


def main(argv: Sequence[str]) -> None:
    """Write what is asked for."""
    parser = command.Parser("python scripts/world.py", __doc__.splitlines()[0])
    parser.add_argument("what", choices=["subjects", "sheet"], help="photographs of every subject, or captioned random scenes")
    parser.add_argument("out", type=Path, help="folder for the subjects, picture for the sheet")
    args = parser.parse_args(command.normalise(argv))
    {"subjects": write_subjects, "sheet": write_sheet}[args.what](args.out)


if __name__ == "__main__":
    command.run(main, sys.argv)
