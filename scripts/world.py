"""The toy world: captioned pictures, drawn from nothing but a seed.

A `Scene` is a handful of plain values (what, which colour and pattern, wearing what, where, how posed and lit).
It draws itself at any size and says what it shows; the same scene is always the same picture, bit for bit.
Random scenes are the pretraining data. `SUBJECTS` are characters that no caption can describe and that random
scenes never show: the things DreamBooth is asked to learn.

Coordinates are fractions of the picture. Places have y downwards; subjects stand on (0, 0) with y upwards and are
about one unit tall, so every shape is drawn in its own small frame and the `Pen` maps it to pixels.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageDraw

Colour = str | tuple[int, ...]
Points = tuple[tuple[float, float], ...] | np.ndarray
Rng = np.random.Generator

INK, SHADE = "#2b2338", "#3d2350"

# --- colour and geometry ---------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def mix(a: Colour, b: Colour = "#000000", t: float = 0.0, alpha: int | None = None) -> tuple[int, ...]:
    """The colour a fraction `t` of the way from `a` to `b`, with an optional opacity (0-255)."""
    first, second = (bytes.fromhex(c[1:]) if isinstance(c, str) else c[:3] for c in (a, b))
    rgb = tuple(round(x + (y - x) * t) for x, y in zip(first, second, strict=True))
    return rgb if alpha is None else (*rgb, alpha)


ARC = np.linspace(0, 1, 9)[:, None]
SPINE = np.linspace(0, 1, 14)[:, None]
CAP = np.linspace(math.pi / 2, -math.pi / 2, 9)[1:-1, None]


@lru_cache(maxsize=1024)
def soft(points: tuple[tuple[float, float], ...], radius: float = 9.0) -> np.ndarray:
    """A closed polygon with rounded corners; a large radius turns it into a smooth blob."""
    corner = np.asarray(points, dtype=float)
    arms = [np.roll(corner, shift, axis=0) - corner for shift in (1, -1)]
    before, after = (a * np.minimum(0.5, radius / np.linalg.norm(a, axis=1).clip(1e-9))[:, None] for a in arms)
    curve = corner[:, None] + before[:, None] * (1 - ARC) ** 2 + after[:, None] * ARC**2
    return curve.reshape(-1, 2)


def panel(left: float, bottom: float, right: float, top: float, radius: float = 0.04) -> np.ndarray:
    """A rectangle with rounded corners."""
    return soft(((left, bottom), (right, bottom), (right, top), (left, top)), radius)


@lru_cache(maxsize=1024)
def oval(x: float, y: float, rx: float, ry: float | None = None) -> np.ndarray:
    """An ellipse, or a circle when only one radius is given."""
    turn = np.linspace(0, math.tau, 40, endpoint=False)
    return np.stack([x + rx * np.cos(turn), y + (ry or rx) * np.sin(turn)], axis=1)


def tube(start: Points, bend: Points, end: Points, width: float, tip: float | None = None) -> np.ndarray:
    """A limb: a thick bent stroke from `start` to `end`, narrowing to `tip`, with a round end."""
    a, b, c = (np.asarray(p, dtype=float) for p in (start, bend, end))
    spine = a * (1 - SPINE) ** 2 + 2 * b * SPINE * (1 - SPINE) + c * SPINE**2
    along = (b - a) * (1 - SPINE) + (c - b) * SPINE
    along /= np.hypot(along[:, :1], along[:, 1:])
    half = (width + ((width if tip is None else tip) - width) * SPINE) / 2
    side = along[:, ::-1] * (-1, 1)
    cap = spine[-1] + half[-1] * (np.cos(CAP) * along[-1] + np.sin(CAP) * side[-1])
    return np.concatenate([spine + side * half, cap, (spine - side * half)[::-1]])


@lru_cache(maxsize=64)
def star(points: int = 5, inner: float = 0.45, turn: float = 0.0) -> tuple[tuple[float, float], ...]:
    """A star of radius one, one tip up."""
    angles = [math.pi / 2 + turn + math.pi * i / points for i in range(2 * points)]
    return tuple((math.cos(a) * r, math.sin(a) * r) for a, r in zip(angles, [1.0, inner] * points, strict=True))


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


class Pen:
    """A square canvas and the current frame; every method takes coordinates of that frame."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.image = Image.new("RGB", (size, size))
        self.draw = ImageDraw.Draw(self.image, "RGBA")
        self.matrix, self.origin, self.unit = np.eye(2) * size, np.zeros(2), float(size)
        self.ink: Colour = INK
        self.trim: Colour = self.ink
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
        return max(1, round(width * self.unit))

    def flat(self, points: Points, colour: Colour) -> None:
        """A plain filled shape."""
        self.draw.polygon(self.put(points).ravel().tolist(), fill=colour)

    def dot(self, x: float, y: float, radius: float, colour: Colour, squash: float = 1.0) -> None:
        """A filled circle (or an upright ellipse), cheaper than a shape."""
        (cx, cy), rx = self.put((x, y)), radius * self.unit
        self.draw.ellipse((cx - rx, cy - rx * squash, cx + rx, cy + rx * squash), fill=colour)

    def line(self, points: Points, width: float, colour: Colour) -> None:
        self.draw.line(self.put(points).ravel().tolist(), fill=colour, width=self.wide(width), joint="curve")

    def _box(self, points: np.ndarray) -> tuple[int, int, int, int]:
        """The pixel box of a shape, within the canvas; it may be empty."""
        left, top = points.min(0).astype(int).clip(0).tolist()
        right, bottom = (points.max(0).astype(int) + 2).clip(0, self.size).tolist()
        return left, top, max(left, right), max(top, bottom)

    @staticmethod
    def _mask(box: tuple[int, int, int, int], points: np.ndarray, shift: float = 0.0) -> Image.Image:
        """The shape, moved towards the light, as a mask of its box."""
        left, top, right, bottom = box
        mask = Image.new("L", (right - left, bottom - top))
        if mask.width and mask.height:
            ImageDraw.Draw(mask).polygon((points - (left + shift, top + shift)).ravel().tolist(), fill=255)
        return mask

    def part(self, points: Points, colour: Colour | None = None, edge: bool = True) -> None:
        """A solid piece with outline and shaded side, in a plain colour or (None) in the subject's own skin."""
        pixels = self.put(points)
        if edge:
            ring = [*pixels.ravel().tolist(), *pixels[:2].ravel().tolist()]
            ink = self.ink if colour is None else mix(colour, INK, 0.72)
            self.draw.line(ring, fill=ink, width=max(2, round(self.size * 0.0175)))
        box = self._box(pixels)
        whole = self._mask(box, pixels)
        lit = ImageChops.darker(whole, self._mask(box, pixels, 0.11 * min(whole.size)))
        if colour is None:
            bright, dim = (skin.crop(box) for skin in self.skin)
        else:
            bright, dim = mix(colour), mix(colour, SHADE, 0.22)
        self.image.paste(dim, box, whole)
        self.image.paste(bright, box, lit)

    def paint(self, layers: "Layers | tuple[()]", anchor: tuple[float, ...]) -> None:
        """A fixed little picture at an anchor: (x, y[, width[, turn]])."""
        with self.frame(*anchor):
            for points, colour, edge in layers:
                self.part(points, colour, edge)

    def shade(self, points: Points, *stops: Colour) -> None:
        """A shape filled with a vertical gradient."""
        pixels = self.put(points)
        box = self._box(pixels)
        mask = self._mask(box, pixels)
        if mask.width and mask.height:
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

    def wear(self, colours: list[str], pattern: str) -> None:
        """Make the subject's skin in the current frame: one colour, or two for a left and a right half."""
        box = self._box(self.put(((-0.75, -0.06), (0.75, -0.06), (0.75, 1.15), (-0.75, 1.15))))
        x = np.arange(box[0], box[2], dtype=np.float32) - np.float32(self.origin[0])
        y = np.arange(box[1], box[3], dtype=np.float32)[:, None] - np.float32(self.origin[1])
        u, v = (row[0] * x + row[1] * y for row in np.linalg.inv(self.matrix).astype(np.float32))
        index = PATTERNS[pattern](u, v).astype(np.uint8)
        if len(colours) > 1:
            index += 2 * (u > 0).astype(np.uint8)
        index += 4 * ((1.1 - v) * 14).clip(0, 15).astype(np.uint8)
        tints = [mix(colour) for name in colours for colour in COLOURS[name]]
        self.ink, self.trim = mix(tints[0], INK, 0.72), mix(tints[0], tints[1], 0.6)
        lights, darks = ([mix(tint, to, t) for tint in (tints * 2)[:4]] for to, t in (("#ffffff", 0.1), (SHADE, 0.14)))
        fall = [mix(*pair, level / 15) for level in range(16) for pair in zip(lights, darks, strict=True)]
        for skin, shade in zip(self.skin, (0.0, 0.24), strict=True):
            patch = Image.fromarray(index)
            patch.putpalette([value for colour in fall for value in mix(colour, SHADE, shade)])
            skin.paste(patch.convert("RGB"), box[:2])


# --- colours and patterns --------------------------------------------------------------------------------------------

COLOURS: dict[str, tuple[str, str]] = {  # a body colour and the colour of the pattern on it
    "red": ("#e0393e", "#ffe9d6"),
    "orange": ("#f58a26", "#fff3d9"),
    "yellow": ("#fbd237", "#a85a1c"),
    "green": ("#46a847", "#eafbc8"),
    "teal": ("#1fb8b0", "#06474f"),
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


def starry(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    x, y = lattice(u, v, 0.27)
    return np.hypot(x, y) < 0.078 + 0.034 * np.cos(5 * np.arctan2(x, y))


def spotted(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    x, y = lattice(u, v, 0.19)
    return x * x + y * y < 0.0042


PATTERNS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "plain": lambda u, v: np.zeros(u.shape, bool),
    "striped": lambda u, v: (v + 0.03) % 0.17 < 0.075,
    "spotted": spotted,
    "checked": lambda u, v: (u % 0.22 < 0.11) ^ (v % 0.22 < 0.11),
    "zigzag": lambda u, v: (v + np.abs(u % 0.2 - 0.1) * 1.1) % 0.21 < 0.085,
    "starry": starry,
}

# --- places: draw what is behind, yield while the subject is drawn, draw what is in front ----------------------------


def scatter(rng: Rng, count: int, *ranges: tuple[float, float]) -> Iterator[tuple[float, ...]]:
    """Random values, one from every range, `count` times."""
    return zip(*(rng.uniform(*limits, count).tolist() for limits in ranges), strict=True)


def block(p: Pen, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
    p.flat(((left, top), (right, top), (right, bottom), (left, bottom)), colour)


def cloud(p: Pen, x: float, y: float, size: float, colour: Colour = "#ffffff", shadow: Colour = "#d5e4f2") -> None:
    puffs = ((-0.5, 0.05, 0.3), (-0.15, -0.14, 0.4), (0.25, -0.05, 0.36), (0.58, 0.08, 0.24))
    for dy, tint in ((0.06, shadow), (0.0, colour)):
        for px, py, r in puffs:
            p.dot(x + px * size, y + (py + dy) * size, r * size, tint, 0.8)


def pine(p: Pen, x: float, y: float, height: float, colour: Colour, snow: bool = False) -> None:
    p.flat(((x - 0.03 * height, y), (x + 0.03 * height, y), (x, y - height * 0.5)), "#5c4030")
    for low, wide in ((0.1, 0.3), (0.36, 0.24), (0.62, 0.17)):
        top, base = y - height * min(1, low + 0.44), y - height * low
        p.flat(((x, top), (x + wide * height, base), (x - wide * height, base)), colour)
        p.flat(((x, top), (x + wide * height, base), (x + wide * 0.2 * height, base)), mix(colour, "#10203c", 0.25))
        if snow:
            t = 0.55
            edge = top + (base - top) * t
            w = wide * height * t
            p.flat(
                ((x, top), (x + w, edge), (x + w * 0.3, edge - 0.02), (x - w * 0.2, edge + 0.01), (x - w, edge)),
                "#fbfdff",
            )


def flower(p: Pen, x: float, y: float, r: float, colour: Colour, heart: Colour = "#ffd84a") -> None:
    for i in range(5):
        p.dot(x + r * math.cos(i * 1.2566), y + r * math.sin(i * 1.2566), r * 0.72, colour)
    p.dot(x, y, r * 0.62, heart)


def tuft(p: Pen, x: float, y: float, height: float, colour: Colour) -> None:
    for lean in (-0.6, 0.0, 0.6):
        p.flat(
            ((x - height * 0.13, y), (x + height * 0.13, y), (x + lean * height, y - height * (1.1 - abs(lean) / 2))),
            colour,
        )


def stars(p: Pen, rng: Rng, count: int, bottom: float) -> None:
    for x, y, r in scatter(rng, count, (0, 1), (0, bottom), (0.003, 0.009)):
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
    x, foot = 0.5 + side * 0.4, sea + 0.28
    p.flat(tube((x, foot), (x + side * 0.04, 0.35), (x - side * 0.07, 0.17), 0.045, 0.028), "#8d6239")
    for dx, dy in ((-0.22, 0.08), (-0.17, -0.07), (0.2, 0.06), (0.15, -0.08), (-0.05, 0.16)):
        top = (x - side * 0.07, 0.17)
        leaf = tube(top, (top[0] + dx * 0.6, top[1] + dy - 0.08), (top[0] + dx, top[1] + dy), 0.06, 0.006)
        p.flat(leaf, "#2f9a4c" if dy > 0 else "#43b85a")
    for x, y in scatter(rng, 12, (0, 1), (sea + 0.3, 1)):
        p.dot(x, y, 0.007, "#c8934d")
    yield
    with p.frame(rng.uniform(0.08, 0.92), 0.94, 0.055, rng.uniform(0, 1)):
        p.part(soft(star(), 0.3), "#f2705c")


def snow(p: Pen, rng: Rng) -> Iterator[None]:
    p.sky("#8fb7e0", "#cfe3f5", "#eef5fb")
    p.hill(rng, 0.52, 0.05, "#c9dcf0", "#dfeaf6")
    for x, h in zip((0.07, 0.24, 0.78, 0.95), rng.uniform(0.26, 0.44, 4), strict=True):
        pine(p, x + rng.uniform(-0.05, 0.05), 0.66, h, "#2f6f62", snow=True)
    p.hill(rng, 0.64, 0.03, "#ffffff", "#c6d8ee")
    p.hill(rng, 0.88, 0.02, "#f4f9ff", "#d3e2f3")
    yield
    for x, y, r in scatter(rng, 34, (0, 1), (0, 1), (0.006, 0.014)):
        p.dot(x, y, r, "#ffffff")


def forest(p: Pen, rng: Rng) -> Iterator[None]:
    p.sky("#cfe88a", "#8cc56c", "#4b8f4f")
    p.glow(rng.uniform(0.3, 0.7), 0.25, 0.4, "#f6ffc0")
    for depth, count, width in ((0.35, 7, 0.03), (0.7, 5, 0.055)):
        bark = mix("#8fbf6e", "#53391f", depth)
        for x in (np.arange(count) + rng.uniform(0.1, 0.9, count)) / count:
            p.flat(((x - width, 0.74), (x - width * 0.6, 0), (x + width * 0.6, 0), (x + width, 0.74)), bark)
    for x in (rng.uniform(0.01, 0.1), rng.uniform(0.9, 0.99)):
        p.flat(
            ((x - 0.1, 0.86), (x - 0.055, 0.72), (x - 0.05, 0), (x + 0.05, 0), (x + 0.055, 0.72), (x + 0.1, 0.86)),
            "#5a3c22",
        )
        p.flat(((x + 0.02, 0), (x + 0.05, 0), (x + 0.055, 0.72), (x + 0.1, 0.86), (x + 0.03, 0.8)), "#432b18")
    for row, tint in ((0.02, "#1f5a35"), (-0.03, "#2d7a41")):
        for x in np.linspace(0, 1, 7) + rng.uniform(-0.05, 0.05, 7):
            p.dot(x, row, 0.14, tint, 0.75)
    p.hill(rng, 0.7, 0.02, "#5d9a3e", "#2a5a2c")
    for x, y in scatter(rng, 8, (0, 1), (0.74, 0.84)):
        tuft(p, x, y, 0.06, "#3d7a34")
    yield
    for x in rng.uniform(0, 1, 9):
        tuft(p, x, 1.01, rng.uniform(0.08, 0.14), "#1f4d2a")


def night(p: Pen, rng: Rng) -> Iterator[None]:
    p.sky("#0b1036", "#1d2a66", "#4a4a94")
    stars(p, rng, 34, 0.6)
    x = rng.choice([rng.uniform(0.12, 0.25), rng.uniform(0.75, 0.88)])
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
    block(p, 0, 0, 1, 1, mix("#141d66", alpha=42))


def city(p: Pen, rng: Rng) -> Iterator[None]:
    p.sky("#7fb2e5", "#c9dcf0", "#fbe3cf")
    cloud(p, rng.uniform(0.2, 0.8), rng.uniform(0.08, 0.16), 0.14)
    walls = ("#c96f5a", "#d9a066", "#8b8fb0", "#6f87a8", "#b5838d")
    for count, low, high, fade in ((7, 0.12, 0.4, 0.55), (5, 0.28, 0.56, 0.0)):
        x = 0.0
        for width in rng.dirichlet(np.full(count, 12.0)):
            top = rng.uniform(low, high)
            wall = mix(mix(rng.choice(walls)), "#b9cbe3", fade)
            p.flat(((x, 0.8), (x, top), (x + width - 0.006, top), (x + width - 0.006, 0.8)), wall)
            p.flat(
                ((x + width * 0.75, 0.8), (x + width * 0.75, top), (x + width, top), (x + width, 0.8)),
                mix(wall, SHADE, 0.2),
            )
            pane = mix("#fff2b0", wall, fade)
            for wy in np.arange(top + 0.035, 0.66, 0.075):
                for wx in (x + width * 0.15, x + width * 0.45):
                    p.flat(((wx, wy), (wx + width * 0.2, wy), (wx + width * 0.2, wy + 0.04), (wx, wy + 0.04)), pane)
            x += width
    p.sky("#b9b6bd", "#a4a1ab", top=0.7, bottom=0.77)
    p.sky("#5b5d6b", "#3e404e", top=0.77)
    for x in np.arange(-0.2, 1.1, 0.27) + rng.uniform(0, 0.2):
        p.flat(((x, 0.9), (x + 0.14, 0.9), (x + 0.13, 0.925), (x - 0.01, 0.925)), "#f4e9b8")
    yield


def cactus(p: Pen, x: float, y: float, h: float) -> None:
    for arm in (-1, 1):
        p.flat(
            tube(
                (x, y - h * (0.42 + arm * 0.06)),
                (x + arm * h * 0.42, y - h * 0.4),
                (x + arm * h * 0.3, y - h * 0.75),
                h * 0.14,
            ),
            "#3f8a4d",
        )
    p.flat(tube((x, y), (x, y - h * 0.5), (x, y - h * 0.95), h * 0.22), "#4da35a")
    p.line(((x + h * 0.04, y - h * 0.08), (x + h * 0.04, y - h * 0.9)), h * 0.035, "#2f7440")


def desert(p: Pen, rng: Rng) -> Iterator[None]:
    p.sky("#f2a65a", "#fbd38a", "#fdecc0")
    x = rng.uniform(0.2, 0.8)
    p.glow(x, 0.2, 0.3, "#fff8d8")
    p.dot(x, 0.2, 0.095, "#fffbe8")
    for x, w, h in ((rng.uniform(0.0, 0.3), 0.17, 0.2), (rng.uniform(0.7, 1.0), 0.2, 0.14)):
        p.shade(((x - w, 0.62), (x - w * 0.7, 0.58 - h), (x + w * 0.7, 0.58 - h), (x + w, 0.62)), "#c4623f", "#dc8a5a")
    p.hill(rng, 0.58, 0.035, "#eeb160", "#d98c45", 0.8)
    for x, h in zip((rng.uniform(0.04, 0.16), rng.uniform(0.86, 0.96)), rng.uniform(0.2, 0.34, 2), strict=True):
        cactus(p, x, 0.72, h)
    p.hill(rng, 0.7, 0.03, "#f4c173", "#cf8340", 0.8)
    for y in (0.82, 0.9, 0.97):
        x = np.linspace(0, 1, 17)
        p.line(np.stack([x, y + 0.012 * np.sin(9 * x + rng.uniform(0, 6))], axis=1), 0.007, "#dd9a52")
    yield


def table(p: Pen, rng: Rng) -> Iterator[None]:
    wall, cloth = str(rng.choice(["#8fc9b4", "#f0b79a", "#9db9e4"])), str(rng.choice(["#e8505b", "#4a86d8", "#f2a33a"]))
    p.sky(mix(wall, "#ffffff", 0.35), wall)
    for y in np.arange(0.06, 0.6, 0.13):
        p.line(((0, y), (1, y)), 0.006, mix(wall, "#ffffff", 0.5))
        for x in np.arange(0.0, 1.1, 0.13):
            p.line(((x, y), (x, y + 0.13)), 0.006, mix(wall, "#ffffff", 0.5))
    side, y = rng.choice([-1, 1]), rng.uniform(0.2, 0.26)
    shelf = 0.5 + side * 0.3
    p.part(panel(shelf - 0.24, y, shelf + 0.24, y + 0.03, 0.005), "#a56a3c")
    for dx, jar in zip((-0.16, 0.0, 0.15), rng.permutation(["#f2c14e", "#e07a5f", "#81b29a", "#b08bd0"]), strict=False):
        p.part(panel(shelf + dx - 0.05, y - 0.13, shelf + dx + 0.05, y - 0.015, 0.02), str(jar))
        p.flat(panel(shelf + dx - 0.04, y - 0.15, shelf + dx + 0.04, y - 0.12, 0.005), "#fff6e4")
    p.sky("#fffaf2", "#f1e6d8", top=0.62)
    for near in np.arange(-3.0, 3.1, 0.3):
        p.flat(
            [
                (0.5 + (near + w) * spread, y)
                for w, spread, y in ((0, 0.55, 0.62), (0.15, 0.55, 0.62), (0.15, 1, 1), (0, 1, 1))
            ],
            mix(cloth, alpha=150),
        )
    for top, bottom in ((0.65, 0.685), (0.725, 0.77), (0.82, 0.875), (0.935, 1.0)):
        p.flat(((0, top), (1, top), (1, bottom), (0, bottom)), mix(cloth, alpha=150))
    p.sky(mix(cloth, SHADE, 0.25), mix(cloth, SHADE, 0.1), top=0.61, bottom=0.625)
    yield


def water(p: Pen, rng: Rng) -> Iterator[None]:
    p.sky("#7fe3ec", "#2aa5d0", "#12609f")
    for x in rng.uniform(0, 1, 4):
        p.flat(((x, 0), (x + 0.09, 0), (x - 0.12, 0.85), (x - 0.32, 0.85)), mix("#ffffff", alpha=34))
    p.hill(rng, 0.74, 0.03, "#2f86a8", "#1f6a90")
    for x, h in zip((0.06, 0.15, 0.85, 0.94), rng.uniform(0.28, 0.5, 4), strict=True):
        lean = rng.uniform(-0.07, 0.07)
        p.flat(
            tube((x, 0.86), (x + lean * 2, 0.86 - h * 0.5), (x - lean, 0.86 - h), 0.05, 0.012),
            "#1f9a6a" if lean > 0 else "#2fb877",
        )
    p.hill(rng, 0.82, 0.02, "#ecd9a0", "#b99f6a")
    x = rng.choice([0.1, 0.9])
    for dx, h in ((-0.05, 0.1), (0.0, 0.15), (0.05, 0.09)):
        p.flat(tube((x, 0.9), (x + dx, 0.9 - h / 2), (x + dx * 1.6, 0.9 - h), 0.035), "#f2718a")
    yield
    block(p, 0, 0, 1, 1, mix("#1fa0d8", alpha=36))
    for x, y, r in scatter(rng, 11, (0, 1), (0.05, 0.8), (0.01, 0.028)):
        p.dot(x, y, r, mix("#e6fbff", alpha=150))
        p.dot(x, y, r * 0.72, mix("#5fc4e2", alpha=170))
        p.dot(x - r * 0.3, y - r * 0.3, r * 0.25, "#ffffff")


def mountains(p: Pen, rng: Rng) -> Iterator[None]:
    p.sky("#5b9be0", "#b5d9f5", "#eaf4fb")
    cloud(p, rng.uniform(0.1, 0.9), rng.uniform(0.08, 0.2), 0.13)
    for x, top in zip((0.16, 0.84, 0.5), (*rng.uniform(0.18, 0.32, 2), rng.uniform(0.1, 0.22)), strict=True):
        x += rng.uniform(-0.08, 0.08)
        half = (0.7 - top) * 0.68
        p.shade(((x - half, 0.7), (x, top), (x + half, 0.7)), "#7d8fb5", "#a9bcd6")
        p.flat(((x, top), (x + half, 0.7), (x + half * 0.15, 0.7), (x + half * 0.08, top + 0.25)), "#5f7199")
        cap, w = (0.7 - top) * 0.36, half * 0.36
        zig = (
            (x + w, top + cap),
            (x + w * 0.5, top + cap * 0.8),
            (x + w * 0.1, top + cap * 1.15),
            (x - w * 0.4, top + cap * 0.75),
        )
        p.flat(((x, top), *zig, (x - w, top + cap)), "#fbfdff")
    p.hill(rng, 0.64, 0.02, "#4f8f6a", "#3d7a58")
    for x in np.arange(0, 1.05, 0.11) + rng.uniform(-0.03, 0.03, 10):
        pine(p, x, 0.72, rng.uniform(0.1, 0.17), "#2c6a4c")
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
    for i, y in enumerate(np.sort(rng.uniform(0.66, 0.95, 22))):
        flower(p, rng.uniform(0, 1), y, 0.008 + 0.03 * (y - 0.6), petals[i % 5])
    yield
    for i, x in enumerate((0.05, 0.14, 0.86, 0.95, rng.uniform(0.2, 0.8))):
        tuft(p, x, 1.01, 0.09, "#3c8f3d")
        flower(p, x + rng.uniform(-0.02, 0.02), rng.uniform(0.9, 0.96), 0.026, petals[i])


def rain(p: Pen, rng: Rng) -> Iterator[None]:
    p.sky("#56657c", "#8494a8", "#b4c0c8")
    p.hill(rng, 0.56, 0.04, "#7d9089", "#6a8078")
    p.hill(rng, 0.66, 0.02, "#6f8d70", "#4a6a5a")
    for x in (0.0, 0.33, 0.66, 1.0):
        cloud(p, x + rng.uniform(-0.08, 0.08), rng.uniform(0.02, 0.1), 0.26, "#76849a", "#4c5a70")
    for x, y in ((rng.uniform(0.05, 0.3), 0.78), (rng.uniform(0.7, 0.95), 0.84), (rng.uniform(0.3, 0.7), 0.95)):
        p.dot(x, y, 0.15, "#8fb0c6", 0.22)
        p.dot(x - 0.01, y - 0.005, 0.1, "#b9d3e2", 0.2)
    yield
    for x, y in scatter(rng, 30, (0, 1.1), (-0.05, 0.95)):
        p.line(((x, y), (x - 0.025, y + 0.085)), 0.009, mix("#d9ecff", alpha=190))


def moon(p: Pen, rng: Rng) -> Iterator[None]:
    p.sky("#07060f", "#15132b", "#2a2748")
    stars(p, rng, 45, 0.65)
    x, y = rng.choice([0.18, 0.82]) + rng.uniform(-0.05, 0.05), rng.uniform(0.15, 0.25)
    p.glow(x, y, 0.2, "#3a6fb5")
    p.part(oval(x, y, 0.11), "#3f8fe0", edge=False)
    for dx, dy, r in ((-0.03, -0.03, 0.045), (0.045, 0.03, 0.035), (-0.04, 0.055, 0.025)):
        p.dot(x + dx, y + dy, r, "#5fbf6a", 0.75)
    p.hill(rng, 0.6, 0.04, "#8d8c9a", "#77768a", 1.4)
    p.hill(rng, 0.67, 0.02, "#cfced6", "#8b8a9c", 0.7)
    for x, y in zip((0.08, 0.3, 0.62, 0.9, 0.2, 0.75), (0.76, 0.9, 0.95, 0.8, 0.98, 0.72), strict=True):
        x, r = x + rng.uniform(-0.06, 0.06), rng.uniform(0.04, 0.09)
        p.dot(x, y, r, "#e6e5ec", 0.36)
        p.dot(x + 0.006, y + 0.008, r * 0.86, "#7d7c90", 0.34)
    yield


def room(p: Pen, rng: Rng) -> Iterator[None]:
    wall, rug = str(rng.choice(["#f2d6a2", "#e8c4b8", "#c3d6b0"])), str(rng.choice(["#b5485a", "#4a6fa5", "#6a4c93"]))
    p.sky(mix(wall, "#ffffff", 0.3), wall, bottom=0.68)
    side = rng.choice([-1, 1])
    x = 0.5 - side * rng.uniform(0.24, 0.3)
    p.part(panel(x - 0.15, 0.08, x + 0.15, 0.44, 0.01), "#ffffff")
    p.shade(panel(x - 0.125, 0.105, x + 0.125, 0.415, 0.005), "#6fbdf0", "#d7f0fb")
    p.line(((x, 0.1), (x, 0.42)), 0.018, "#ffffff")
    p.line(((x - 0.13, 0.26), (x + 0.13, 0.26)), 0.018, "#ffffff")
    for edge in (-1, 1):
        p.part(
            soft(
                (
                    (x + edge * 0.21, 0.05),
                    (x + edge * 0.07, 0.05),
                    (x + edge * 0.13, 0.3),
                    (x + edge * 0.12, 0.5),
                    (x + edge * 0.21, 0.5),
                ),
                0.05,
            ),
            rug,
        )
    x = 0.5 + side * 0.4
    p.glow(x, 0.3, 0.22, "#fff4c0")
    p.line(((x, 0.36), (x, 0.74)), 0.018, "#5c4636")
    p.part(((x - 0.05, 0.22), (x + 0.05, 0.22), (x + 0.09, 0.37), (x - 0.09, 0.37)), "#f7b94a")
    p.sky("#b07a4a", "#d19c66", top=0.68)
    p.sky("#fff8ea", "#e8dcc8", top=0.66, bottom=0.69)
    for slope in np.arange(-1.5, 1.6, 0.3):
        p.line(((0.5 + slope * 0.8, 0.69), (0.5 + slope * 1.4, 1.0)), 0.005, "#94622f")
    p.dot(0.5, 0.88, 0.44, rug, 0.24)
    p.dot(0.5, 0.88, 0.38, mix(rug, "#ffffff", 0.5), 0.24)
    p.dot(0.5, 0.88, 0.35, rug, 0.24)
    yield


def sunset(p: Pen, rng: Rng) -> Iterator[None]:
    p.sky("#4b2a7b", "#c4447e", "#fb8a4c", "#ffd36b", bottom=0.6)
    x = rng.uniform(0.25, 0.75)
    p.glow(x, 0.56, 0.42, "#ffe48a")
    p.dot(x, 0.56, 0.15, "#fff0a0")
    for y in rng.uniform(0.1, 0.4, 4):
        cx = rng.uniform(0, 1)
        p.flat(oval(cx, y, rng.uniform(0.1, 0.2), 0.014), "#f58a8a")
    p.sky("#e8686a", "#7a3a86", "#4a2a70", top=0.6)
    for y, w in zip(np.arange(0.62, 0.78, 0.03), rng.uniform(0.06, 0.16, 6), strict=False):
        p.flat(oval(x + rng.uniform(-0.03, 0.03), y, w, 0.008), "#ffd98a")
    p.hill(rng, 0.76, 0.02, "#5a2f5c", "#2c1838")
    yield
    block(p, 0, 0, 1, 1, mix("#ff7a3c", alpha=22))


def clouds(p: Pen, rng: Rng) -> Iterator[None]:
    p.sky("#3d8fe8", "#8cc8f8", "#d3ecfd")
    x = rng.uniform(0.3, 0.7)
    for i, tint in enumerate(("#f25c5c", "#fba94c", "#fbe45c", "#6cc96c", "#5c9cf2", "#9a6ce0")):
        r = 0.58 - i * 0.032
        p.draw.arc(
            [v * p.size for v in (x - r, 0.72 - r, x + r, 0.72 + r)], 180, 360, fill=mix(tint), width=p.wide(0.034)
        )
    for y, tint in ((0.74, "#dcebfa"), (0.86, "#eef6fe")):
        for cx in np.arange(0.0, 1.1, 0.2) + rng.uniform(-0.06, 0.06, 6):
            p.dot(cx, y + rng.uniform(-0.02, 0.02), 0.16, tint, 0.72)
    p.sky("#eef6fe", "#c9dff5", top=0.88)
    yield
    for cx in np.arange(0.0, 1.1, 0.22) + rng.uniform(-0.06, 0.06, 5):
        p.dot(cx, 1.02, 0.12, "#ffffff", 0.75)


class Place(NamedTuple):
    draw: Callable[[Pen, Rng], Iterator[None]]
    words: str


PLACES: dict[str, Place] = {
    "beach": Place(beach, "on the beach"),
    "snow": Place(snow, "in the snow"),
    "forest": Place(forest, "in the forest"),
    "night": Place(night, "at night"),
    "city": Place(city, "in the city"),
    "desert": Place(desert, "in the desert"),
    "table": Place(table, "on a table"),
    "water": Place(water, "under water"),
    "mountains": Place(mountains, "in the mountains"),
    "meadow": Place(meadow, "in a meadow"),
    "rain": Place(rain, "in the rain"),
    "moon": Place(moon, "on the moon"),
    "room": Place(room, "in a room"),
    "sunset": Place(sunset, "at sunset"),
    "clouds": Place(clouds, "in the clouds"),
}

# --- classes: drawn facing right, feet on (0, 0); pose runs from -1 to 1 ---------------------------------------------

METAL, DARK, CREAM, GOLD, ROSE, GLASS = "#a9b3c4", "#2b2f42", "#fff1dc", "#ffc93c", "#f59bb0", "#bfe8fb"


def eye(p: Pen, x: float, y: float, r: float, look: float = 0.2) -> None:
    p.dot(x, y, r, "#241c30")
    p.dot(x + r * look, y + r * 0.35, r * 0.4, "#ffffff")


def smile(p: Pen, x: float, y: float, w: float, width: float = 0.016) -> None:
    turn = np.linspace(math.pi * 1.1, math.pi * 1.9, 9)
    p.line(np.stack([x + w * np.cos(turn), y + w * 0.7 * np.sin(turn)], axis=1), width, "#241c30")


def robot(p: Pen, pose: float) -> None:
    for side in (-1, 1):
        lift = 0.5 + side * pose * 0.28
        p.part(tube((side * 0.25, 0.5), (side * 0.42, 0.48), (side * 0.42, 0.42 + (lift - 0.5) * 0.9), 0.085), METAL)
        p.part(oval(side * 0.42, 0.41 + (lift - 0.5) * 0.95, 0.062))
        p.part(panel(side * 0.13 - 0.055, 0.04, side * 0.13 + 0.055, 0.25, 0.02), METAL)
        p.part(panel(side * 0.14 - 0.1, 0.0, side * 0.14 + 0.1, 0.085, 0.05))
    p.part(panel(-0.08, 0.52, 0.08, 0.64, 0.01), METAL)
    p.line(((0, 0.9), (0, 0.99)), 0.028, DARK)
    p.part(oval(0, 1.0, 0.042), "#ff5a4d")
    for side in (-1, 1):
        p.part(panel(side * 0.24 - 0.04, 0.68, side * 0.24 + 0.04, 0.82, 0.02), METAL)
    p.part(panel(-0.27, 0.2, 0.27, 0.57, 0.07))
    p.part(panel(-0.23, 0.61, 0.23, 0.91, 0.08))
    p.part(panel(-0.175, 0.66, 0.175, 0.85, 0.06), DARK)
    for side in (-1, 1):
        p.dot(side * 0.085, 0.775, 0.044, "#7df3ff")
        p.dot(side * 0.085 - 0.012, 0.79, 0.016, "#ffffff")
        for y in (0.245, 0.525):
            p.dot(side * 0.225, y, 0.014, mix(p.ink, alpha=150))
    p.line(((-0.05, 0.7), (0.05, 0.7)), 0.02, "#7df3ff")


def cat(p: Pen, pose: float) -> None:
    p.part(tube((0.18, 0.08), (0.52, 0.02), (0.42 + 0.06 * pose, 0.42 + 0.06 * pose), 0.1, 0.075))
    p.part(soft(((-0.3, -0.03), (0.3, -0.03), (0.34, 0.25), (0.16, 0.62), (-0.16, 0.62), (-0.34, 0.25))))
    for side in (-1, 1):
        p.part(oval(side * 0.11, 0.045, 0.095, 0.055))
        p.part(soft(((side * 0.3, 0.66), (side * 0.31, 1.02), (side * 0.05, 0.86)), 0.05))
        p.flat(soft(((side * 0.26, 0.75), (side * 0.275, 0.94), (side * 0.12, 0.85)), 0.03), ROSE)
    p.part(oval(0, 0.69, 0.32, 0.235))
    p.part(oval(0, 0.61, 0.12, 0.08), CREAM, edge=False)
    for side in (-1, 1):
        p.dot(side * 0.14, 0.72, 0.06, "#fdfff0")
        eye(p, side * 0.14 + 0.012 * pose, 0.72, 0.042)
        for dy in (0.02, -0.035):
            p.line(((side * 0.17, 0.61 + dy * 0.3), (side * 0.36, 0.62 + dy)), 0.009, mix("#fff8ee", "#5a4a5a", 0.25))
    p.flat(soft(((-0.035, 0.65), (0.035, 0.65), (0, 0.61)), 0.01), "#e0587a")
    smile(p, -0.03, 0.605, 0.03, 0.013)
    smile(p, 0.03, 0.605, 0.03, 0.013)


def dog(p: Pen, pose: float) -> None:
    p.part(tube((-0.36, 0.42), (-0.5, 0.5), (-0.52 + 0.05 * pose, 0.72), 0.085, 0.05))
    for x, step in ((-0.24, -pose), (0.22, pose), (-0.34, pose), (0.12, -pose)):
        p.part(tube((x, 0.3), (x, 0.15), (x + 0.05 * step, 0.04), 0.115))
        p.part(oval(x + 0.05 * step + 0.025, 0.04, 0.08, 0.045))
    p.part(soft(((-0.46, 0.2), (0.32, 0.2), (0.36, 0.56), (-0.1, 0.54), (-0.46, 0.58))))
    p.part(soft(((0.05, 0.5), (0.36, 0.4), (0.52, 0.6), (0.5, 0.96), (0.08, 0.96))))
    p.part(oval(0.44, 0.62, 0.15, 0.105), CREAM)
    p.part(oval(0.55, 0.675, 0.05, 0.04), "#2b2338", edge=False)
    p.line(((0.4, 0.575), (0.47, 0.56), (0.53, 0.585)), 0.015, "#241c30")
    eye(p, 0.39, 0.785, 0.045)
    p.part(soft(((0.02, 0.95), (0.2, 0.95), (0.22, 0.56), (0.06, 0.5), (-0.03, 0.64))), mix(p.ink, p.trim, 0.3))


def bird(p: Pen, pose: float) -> None:
    for x in (-0.06, 0.1):
        p.line(((x, 0.2), (x, 0.02)), 0.032, "#c46a1a")
        p.line(((x - 0.05, 0.012), (x + 0.08, 0.012)), 0.032, "#c46a1a")
    p.part(soft(((-0.2, 0.5), (-0.62, 0.46), (-0.58, 0.3), (-0.15, 0.24)), 0.06))
    p.part(soft(((0.38, 0.76), (0.64, 0.66), (0.38, 0.6)), 0.03), "#ffae2b")
    p.part(soft(((-0.34, 0.2), (0.14, 0.06), (0.42, 0.3), (0.48, 0.86), (0.26, 1.0), (-0.02, 0.86), (-0.2, 0.56))))
    p.part(soft(((0.08, 0.14), (0.38, 0.24), (0.36, 0.54), (0.2, 0.52))), CREAM, edge=False)
    wing = 0.32 * pose
    p.part(soft(((0.14, 0.52), (-0.02, 0.62), (-0.4, 0.4 + wing), (-0.42, 0.22 + wing), (-0.04, 0.22))))
    p.dot(0.27, 0.76, 0.075, "#ffffff")
    eye(p, 0.285, 0.76, 0.05)
    p.dot(0.2, 0.64, 0.035, mix(ROSE, alpha=170))


def fish(p: Pen, pose: float) -> None:
    p.part(soft(((-0.3, 0.44), (-0.64, 0.72 + 0.05 * pose), (-0.56, 0.44), (-0.64, 0.16 + 0.05 * pose)), 0.07))
    p.part(soft(((-0.2, 0.66), (-0.08, 0.92), (0.2, 0.86), (0.2, 0.66)), 0.08), p.trim)
    p.part(soft(((-0.05, 0.2), (-0.16, 0.03), (0.08, 0.1), (0.12, 0.22)), 0.05), p.trim)
    p.part(soft(((-0.46, 0.44), (-0.2, 0.72), (0.2, 0.8), (0.56, 0.56), (0.56, 0.36), (0.2, 0.08), (-0.2, 0.16))))
    p.part(soft(((0.02, 0.46), (-0.16, 0.5 + 0.08 * pose), (-0.16, 0.28 + 0.08 * pose), (0.0, 0.34)), 0.06), p.trim)
    p.dot(0.32, 0.54, 0.082, "#ffffff")
    eye(p, 0.335, 0.54, 0.054)
    p.dot(0.26, 0.37, 0.045, mix(ROSE, alpha=170))
    smile(p, 0.43, 0.4, 0.06, 0.02)


def car(p: Pen, pose: float) -> None:
    p.part(soft(((-0.36, 0.34), (-0.28, 0.66), (0.14, 0.66), (0.34, 0.34)), 0.1))
    p.part(soft(((-0.27, 0.37), (-0.22, 0.6), (-0.06, 0.6), (-0.06, 0.37)), 0.03), GLASS)
    p.part(soft(((0.0, 0.37), (0.0, 0.6), (0.12, 0.6), (0.25, 0.37)), 0.03), GLASS)
    p.part(soft(((-0.6, 0.1), (0.62, 0.1), (0.63, 0.3), (0.38, 0.41), (-0.56, 0.41), (-0.61, 0.3)), 0.08))
    p.part(panel(0.52, 0.24, 0.63, 0.33, 0.04), "#fff2a0")
    p.part(panel(-0.62, 0.25, -0.56, 0.33, 0.02), "#ff6a5a", edge=False)
    p.part(panel(-0.66, 0.08, 0.67, 0.145, 0.03), METAL)
    p.line(((-0.03, 0.34), (0.05, 0.34)), 0.022, p.ink)
    for x in (-0.34, 0.36):
        p.part(oval(x, 0.13, 0.14), "#3a3a48")
        p.part(oval(x, 0.13, 0.072), "#d9dee8", edge=False)
        for spoke in np.arange(3) * math.tau / 6 + pose:
            dx, dy = 0.06 * math.cos(spoke), 0.06 * math.sin(spoke)
            p.line(((x - dx, 0.13 - dy), (x + dx, 0.13 + dy)), 0.014, "#8a93a6")


def rocket(p: Pen, pose: float) -> None:
    for x, y, r in ((-0.2, 0.04, 0.09), (0.2, 0.03, 0.1), (0.0, 0.02, 0.12)):
        p.dot(x, y, r, mix("#f4f1ee", alpha=215), 0.7)
    flame = 0.05 * pose
    p.part(soft(((-0.1, 0.2), (0.0, -0.02 - flame), (0.1, 0.2)), 0.04), "#ff8a2a")
    p.flat(soft(((-0.05, 0.2), (0.0, 0.06 - flame), (0.05, 0.2)), 0.03), "#ffe25c")
    for side in (-1, 1):
        p.part(soft(((side * 0.14, 0.46), (side * 0.36, 0.26), (side * 0.36, 0.06), (side * 0.14, 0.2)), 0.05), p.trim)
    p.part(soft(((-0.17, 0.16), (0.17, 0.16), (0.27, 0.5), (0.2, 0.84), (0.0, 1.12), (-0.2, 0.84), (-0.27, 0.5))))
    p.part(soft(((-0.165, 0.83), (0.165, 0.83), (0.06, 0.98), (0.0, 1.02), (-0.06, 0.98)), 0.03), p.trim)
    p.part(oval(0, 0.62, 0.125), METAL)
    p.part(oval(0, 0.62, 0.085), "#8fdcf7", edge=False)
    p.dot(-0.03, 0.65, 0.022, "#ffffff")
    p.part(panel(-0.14, 0.14, 0.14, 0.2, 0.02), METAL)


def house(p: Pen, pose: float) -> None:
    p.part(panel(0.17, 0.7, 0.3, 1.0, 0.01), "#b5654a")
    for i in range(3):
        p.dot(0.24 + (0.05 + 0.05 * pose) * i, 1.06 + 0.075 * i, 0.04 + 0.012 * i, mix("#ffffff", alpha=170 - 30 * i))
    p.part(panel(-0.4, 0.0, 0.4, 0.6, 0.02))
    p.part(soft(((-0.52, 0.55), (0.0, 1.0), (0.52, 0.55)), 0.05), mix(p.ink, "#e05a45", 0.75))
    p.part(oval(0, 0.72, 0.075), "#fff3b8")
    p.part(soft(((-0.1, 0.0), (0.1, 0.0), (0.1, 0.36), (-0.1, 0.36)), 0.07), "#8a5530")
    p.dot(0.06, 0.17, 0.018, GOLD)
    for side in (-1, 1):
        x = side * 0.25
        p.part(panel(x - 0.085, 0.24, x + 0.085, 0.42, 0.01), "#fff3b8")
        p.line(((x, 0.24), (x, 0.42)), 0.018, "#8a5530")
        p.line(((x - 0.08, 0.33), (x + 0.08, 0.33)), 0.018, "#8a5530")


def mushroom(p: Pen, pose: float) -> None:
    p.part(soft(((-0.2, -0.03), (0.2, -0.03), (0.24, 0.16), (0.15, 0.5), (-0.15, 0.5), (-0.24, 0.16)), 0.14), CREAM)
    p.part(soft(((-0.56, 0.38), (0.56, 0.38), (0.52, 0.78), (0.2, 1.06), (-0.2, 1.06), (-0.52, 0.78))))
    p.part(oval(0, 0.45, 0.38, 0.045), "#e9cfae")
    for side in (-1, 1):
        eye(p, side * 0.085 + 0.02 * pose, 0.26, 0.034)
        p.dot(side * 0.15 + 0.02 * pose, 0.19, 0.03, mix(ROSE, alpha=190))
    smile(p, 0.02 * pose, 0.215, 0.04)


def cup(p: Pen, pose: float) -> None:
    p.part(oval(0, 0.06, 0.5, 0.065), "#f2ede4")
    ring = soft(((0.3, 0.62), (0.66, 0.64), (0.62, 0.22), (0.24, 0.2)))
    p.line(np.concatenate([ring, ring[:2]]), 0.115, p.ink)
    p.line(np.concatenate([ring, ring[:2]]), 0.075, p.trim)
    p.part(soft(((-0.4, 0.74), (0.4, 0.74), (0.36, 0.3), (0.22, 0.05), (-0.22, 0.05), (-0.36, 0.3)), 0.14))
    p.part(oval(0, 0.72, 0.4, 0.09))
    p.part(oval(0, 0.715, 0.34, 0.062), "#6b3f22", edge=False)
    for side in (-1, 0, 1):
        x = side * 0.15
        p.flat(tube((x, 0.76), (x + 0.12 * (pose or 0.3), 0.86), (x, 0.98), 0.04, 0.015), mix("#ffffff", alpha=130))


def tree(p: Pen, pose: float) -> None:
    p.part(
        soft(((-0.16, -0.02), (0.16, -0.02), (0.085, 0.16), (0.1, 0.5), (-0.1, 0.5), (-0.085, 0.16)), 0.05), "#8a5a34"
    )
    p.line(((0.0, 0.34), (0.16, 0.46)), 0.05, "#6b4426")
    sway = 0.03 * pose
    for x, y, r in (
        (-0.27, 0.52, 0.23),
        (0.28, 0.53, 0.23),
        (0.0, 0.84, 0.25),
        (-0.2 + sway, 0.72, 0.22),
        (0.2 + sway, 0.72, 0.22),
    ):
        p.part(oval(x + sway, y, r))
    p.part(oval(sway, 0.6, 0.3, 0.24), edge=False)


class Kind(NamedTuple):
    """How to draw a class and where things go on it: (x, y, width[, turn])."""

    draw: Callable[[Pen, float], None]
    head: tuple[float, float, float]
    eyes: tuple[float, float, float]
    neck: tuple[float, float, float, float]
    hand: tuple[float, float]
    chest: tuple[float, float, float]
    tip: tuple[float, float, float]
    reach: float = 0.5
    size: float = 1.0


CLASSES: dict[str, Kind] = {
    "robot": Kind(
        robot, (0, 0.9, 0.46), (0, 0.775, 0.36), (0, 0.585, 0.4, 0), (-0.42, 0.4), (0, 0.385, 0.145), (0, 1.02, 0.12)
    ),
    "cat": Kind(
        cat, (0, 0.9, 0.44), (0, 0.72, 0.46), (0, 0.47, 0.46, 0), (-0.28, 0.3), (0, 0.3, 0.14), (-0.27, 0.98, 0.15)
    ),
    "dog": Kind(
        dog,
        (0.26, 0.95, 0.4),
        (0.4, 0.785, 0.34),
        (0.27, 0.47, 0.4, 0.3),
        (-0.3, 0.56),
        (-0.12, 0.4, 0.14),
        (-0.5, 0.75, 0.13),
        0.56,
        0.96,
    ),
    "bird": Kind(
        bird,
        (0.25, 0.94, 0.36),
        (0.28, 0.76, 0.36),
        (0.17, 0.55, 0.46, 0),
        (-0.3, 0.6),
        (0.2, 0.34, 0.12),
        (0.2, 1.02, 0.14),
        0.62,
        0.92,
    ),
    "fish": Kind(
        fish,
        (0.12, 0.75, 0.4),
        (0.33, 0.54, 0.32),
        (0.14, 0.42, 0.6, 1.5),
        (-0.1, 0.72),
        (-0.05, 0.46, 0.14),
        (0.05, 0.95, 0.13),
        0.64,
        0.95,
    ),
    "car": Kind(
        car,
        (-0.07, 0.64, 0.42),
        (0.0, 0.49, 0.46),
        (-0.07, 0.385, 0.66, 0),
        (-0.5, 0.41),
        (-0.03, 0.25, 0.12),
        (-0.07, 0.76, 0.16),
        0.66,
        0.98,
    ),
    "rocket": Kind(
        rocket,
        (0, 0.96, 0.32),
        (0, 0.62, 0.42),
        (0, 0.43, 0.54, 0),
        (-0.26, 0.5),
        (0, 0.34, 0.12),
        (0, 1.06, 0.12),
        0.4,
        0.96,
    ),
    "house": Kind(
        house,
        (0, 0.93, 0.42),
        (0, 0.33, 0.6),
        (0, 0.53, 0.82, 0),
        (-0.42, 0.5),
        (0, 0.72, 0.13),
        (0, 1.04, 0.14),
        0.55,
        0.92,
    ),
    "tree": Kind(
        tree,
        (0, 1.02, 0.42),
        (0, 0.68, 0.46),
        (0, 0.4, 0.3, 0),
        (-0.42, 0.5),
        (0, 0.62, 0.15),
        (0.3, 0.86, 0.14),
        0.52,
        0.95,
    ),
    "mushroom": Kind(
        mushroom,
        (0, 1.0, 0.42),
        (0, 0.26, 0.34),
        (0, 0.11, 0.44, 0),
        (-0.5, 0.5),
        (0, 0.74, 0.16),
        (0.3, 1.0, 0.14),
        0.56,
        0.95,
    ),
    "cup": Kind(
        cup,
        (-0.05, 0.76, 0.46),
        (0, 0.5, 0.5),
        (0, 0.28, 0.7, 0),
        (-0.36, 0.5),
        (-0.02, 0.38, 0.16),
        (0.32, 0.82, 0.14),
        0.56,
        0.98,
    ),
}

# --- layers: fixed little pictures as rows of (shape, colour, edge), one unit wide -----------------------------------

Layers = list[tuple[np.ndarray, str, bool]]

HAT: Layers = [
    (soft(((-0.36, 0.02), (-0.3, 0.56), (0.3, 0.56), (0.36, 0.02)), 0.14), "#d8232f", True),
    (soft(((-0.36, 0.06), (-0.345, 0.2), (0.345, 0.2), (0.36, 0.06)), 0.02), "#fff0d0", False),
    (oval(0, 0.03, 0.62, 0.1), "#d8232f", True),
]
PEAKS = ((-0.44, 0.0), (-0.52, 0.52), (-0.24, 0.28), (0.0, 0.66), (0.24, 0.28), (0.52, 0.52), (0.44, 0.0))
CROWN: Layers = [
    (soft(PEAKS, 0.04), GOLD, True),
    *((oval(x, 0.14, 0.075), tint, False) for x, tint in ((-0.27, "#e0314a"), (0, "#3a7be8"), (0.27, "#e0314a"))),
    *((oval(x, y, 0.075), "#fff0a8", True) for x, y in PEAKS[1:6:2]),
]
SCARF: Layers = [
    (soft(((0.18, 0.02), (0.42, 0.02), (0.46, -0.54), (0.2, -0.54)), 0.05), "#2a5fd8", True),
    (panel(0.2, -0.42, 0.44, -0.34, 0.01), "#cfe2ff", False),
    (soft(((-0.56, 0.08), (0, 0), (0.56, 0.08), (0.56, -0.12), (0, -0.22), (-0.56, -0.12)), 0.09), "#3f79f0", True),
    *((tube((x, 0.02), (x, -0.06), (x + 0.04, -0.16), 0.06), "#cfe2ff", False) for x in (-0.3, 0.0)),
]
GLASSES: Layers = [
    (panel(-0.56, 0.0, 0.56, 0.08, 0.02), "#17141f", False),
    *((oval(x, 0, 0.25, 0.22), "#17141f", False) for x in (-0.27, 0.27)),
    *((oval(x, 0, 0.17, 0.145), "#5fd0f0", False) for x in (-0.27, 0.27)),
    *((tube((x - 0.09, -0.03), (x, 0.06), (x + 0.03, 0.09), 0.05), "#e6fbff", False) for x in (-0.27, 0.27)),
]
FLOWER: Layers = [
    *((oval(0.34 + 0.2 * x, 0.04 + 0.2 * y, 0.12), "#ff6fb0", True) for x, y in star(6)[::2]),
    (oval(0.34, 0.04, 0.125), "#ffd84a", True),
]
BOW: Layers = [
    *((soft(((0, 0), (side * 0.5, 0.27), (side * 0.5, -0.27)), 0.09), "#b83bd8", True) for side in (-1, 1)),
    (oval(0, 0, 0.13, 0.15), "#8a22ad", True),
]
BALLOON: Layers = [
    (tube((0, 0), (-0.05, 0.16), (-0.12, 0.32), 0.014), "#f5f2ea", False),
    (soft(((-0.12, 0.29), (0.06, 0.5), (0.03, 0.68), (-0.27, 0.68), (-0.3, 0.5))), "#f2384c", True),
    (soft(((-0.12, 0.36), (-0.08, 0.31), (-0.16, 0.31)), 0.01), "#f2384c", True),
    (oval(-0.19, 0.58, 0.022, 0.04), "#ffd9dc", False),
]
STAR: Layers = [(soft(star(), 0.12), GOLD, True), (oval(0, 0, 0.2), "#e0393e", False)]
ZAP = ((0.15, 0.85), (-0.5, -0.1), (-0.05, -0.1), (-0.15, -0.85), (0.5, 0.15), (0.05, 0.15))
BOLT: Layers = [(soft(ZAP, 0.04), "#ffe14d", True)]
HEART: Layers = [
    (soft(((0, -0.75), (-0.75, 0), (-0.7, 0.75), (0, 0.3), (0.7, 0.75), (0.75, 0)), 0.5), "#f23d5c", True),
    (oval(-0.3, 0.22, 0.13), "#ffd0da", False),
]
EYE: Layers = [
    (soft(((-1, 0), (0, 0.75), (1, 0), (0, -0.75)), 0.5), "#ffffff", True),
    *((oval(0, 0, radius), tint, False) for radius, tint in ((0.36, "#7a2fd0"), (0.16, "#16101f"))),
]
STAR_TIP: Layers = [
    (soft(star(), 0.12), "#ff4fa0", True),
    (soft(tuple((x * 0.5, y * 0.5) for x, y in star()), 0.06), "#fff3a0", False),
]
HORN: Layers = [
    (soft(((-0.4, -0.7), (0.5, -0.7), (-0.15, 1.2)), 0.1), "#48d6c0", True),
    *(
        (tube((-0.38 + y * 0.12, y - 0.12), (0, y), (0.36 - y * 0.4, y + 0.1), 0.16), "#0f6f70", False)
        for y in (-0.3, 0.1, 0.5)
    ),
]
FLAG: Layers = [
    (panel(-0.09, -1.2, 0.09, 1.1, 0.05), DARK, False),
    (soft(((0, 1.05), (1.3, 0.65), (0, 0.1)), 0.08), "#ff4f6d", True),
    (oval(0.4, 0.62, 0.18), "#ffffff", False),
]
KEY: Layers = [
    (panel(-0.14, -1.0, 0.14, 0.2, 0.05), METAL, True),
    *((oval(x, 0.45, 0.46), GOLD, True) for x in (-0.48, 0.48)),
    *((oval(x, 0.45, 0.2), "#8a5a10", False) for x in (-0.48, 0.48)),
]


class Accessory(NamedTuple):
    """The words for it, the anchor it hangs on (a field of `Kind`), and the layers."""

    words: str = ""
    anchor: str = "head"
    layers: Layers | tuple[()] = ()


ACCESSORIES: dict[str, Accessory] = {
    "none": Accessory(),
    "red hat": Accessory("wearing a red hat", "head", HAT),
    "blue scarf": Accessory("wearing a blue scarf", "neck", SCARF),
    "crown": Accessory("wearing a crown", "head", CROWN),
    "glasses": Accessory("wearing glasses", "eyes", GLASSES),
    "flower": Accessory("wearing a flower", "head", FLOWER),
    "bow tie": Accessory("wearing a bow tie", "neck", BOW),
    "balloon": Accessory("with a balloon", "hand", BALLOON),
}

# --- subjects: marks that no word of the captions names --------------------------------------------------------------


class Mark(NamedTuple):
    """What makes a subject one of a kind: two halves, a badge on the chest, an odd part."""

    kind: str
    halves: tuple[str, str]
    disc: str
    badge: Layers
    odd: Layers


SUBJECTS: dict[str, Mark] = {
    "robot": Mark("robot", ("orange", "teal"), "#23306e", STAR, STAR_TIP),
    "cat": Mark("cat", ("white", "purple"), "#3a2a6a", BOLT, HORN),
    "cup": Mark("cup", ("blue", "yellow"), "#fff6e4", HEART, FLAG),
    "car": Mark("car", ("pink", "green"), "#ffd23c", EYE, KEY),
}

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
        tables = {"kind": CLASSES, "colour": COLOURS, "pattern": PATTERNS, "accessory": ACCESSORIES, "place": PLACES}
        values: dict[str, object] = {name: list(table)[rng.integers(len(table))] for name, table in tables.items()}
        bare, plain = rng.random(2)
        values["accessory"] = "none" if bare < 0.3 else values["accessory"]
        values["pattern"] = "plain" if plain < 0.2 else values["pattern"]
        ranges = {"x": (0.42, 0.58), "y": (0.84, 0.93), "size": (0.5, 0.7), "pose": (-1, 1), "tilt": (-0.1, 0.1)}
        ranges |= {"light": (0.93, 1.08), "warmth": (-0.05, 0.05)}
        values |= {name: round(float(rng.uniform(*limits)), 4) for name, limits in ranges.items()}
        values |= {"flip": bool(rng.integers(2)), "seed": int(rng.integers(2**31))}
        return cls(**(values | fixed))

    def _frame(self, pen: Pen):
        """The subject's own frame on the canvas."""
        return pen.frame(self.x, self.y, self.size * CLASSES[self.kind].size, self.tilt, -1 if self.flip else 1, -1)

    def draw(self, size: int = 64) -> np.ndarray:
        """The picture, uint8 [size, size, 3]; drawn larger and averaged down, so that edges are smooth."""
        over = 3 if size <= 64 else 2
        pen = Pen(size * over)
        kind, accessory = CLASSES[self.kind], ACCESSORIES[self.accessory]
        layers = PLACES[self.place].draw(pen, np.random.default_rng(self.seed))
        next(layers)
        reach = kind.reach * self.size * kind.size
        pen.glow(self.x + 0.02, self.y, reach * 1.45, "#140f2a", 0.2, 200)
        with self._frame(pen):
            mark = SUBJECTS.get(self.marks)
            pen.wear(list(mark.halves) if mark else [self.colour], self.pattern)
            kind.draw(pen, self.pose)
            if mark:
                ring: Layers = [(oval(0, 0, 1.15), "#fff8ea", True), (oval(0, 0, 0.95), mark.disc, False)]
                x, y, radius = kind.chest
                pen.paint(ring, kind.chest)
                pen.paint(mark.badge, (x, y, radius * 0.8))
                pen.paint(mark.odd, kind.tip)
            pen.paint(accessory.layers, getattr(kind, accessory.anchor))
        next(layers, None)
        gains = (self.light * (1 + self.warmth), self.light, self.light * (1 - self.warmth))
        picture = np.asarray(pen.image.reduce(over)) * np.float32(gains)
        return np.clip(np.round(picture), 0, 255).astype(np.uint8)

    def caption(self, rng: Rng | None = None) -> str:
        """What the picture shows: in full, or (with an rng) with words left out and other turns of phrase."""
        keep = (lambda chance: True) if rng is None else (lambda chance: bool(rng.random() < chance))
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
        style = "a photo of" if keep(0.8) else "a picture of"
        return " ".join([style, *words])

    def mark_box(self, size: int = 64) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of the subject's badge and odd part, in pixels of a picture of that size."""
        pen, kind = Pen(size), CLASSES[self.kind]
        corners = []
        with self._frame(pen):
            for (x, y, r), spread in ((kind.chest, 1.2), (kind.tip, 1.3)):
                corners += [(x + sx * r * spread, y + sy * r * spread) for sx in (-1, 1) for sy in (-1, 1)]
            pixels = pen.put(corners)
        left, top = np.floor(pixels.min(0)).clip(0, size).astype(int).tolist()
        right, bottom = np.ceil(pixels.max(0)).clip(0, size).astype(int).tolist()
        return left, top, right, bottom


def subject_scene(name: str, rng: Rng, **fixed: object) -> Scene:
    """A random scene with one of the `SUBJECTS`, bare of accessories unless asked for."""
    mark = SUBJECTS[name]
    looks = {"kind": mark.kind, "colour": mark.halves[0], "pattern": "plain", "accessory": "none", "flip": False}
    scene = Scene.random(rng, **(looks | fixed), marks=name)
    return scene if "size" in fixed else replace(scene, size=round(0.6 + (scene.size - 0.5) * 0.5, 4))


# --- command line ----------------------------------------------------------------------------------------------------


def write_subjects(out: Path, count: int = 5) -> None:
    """A few photographs of every subject, each in another place and pose."""
    for number, name in enumerate(SUBJECTS):
        rng = np.random.default_rng([number, 2])
        places = rng.permutation(["meadow", "room", "beach", "city", "snow", "table", "mountains"]).tolist()
        (out / name).mkdir(parents=True, exist_ok=True)
        for i, place in enumerate(places[:count]):
            pose = round(-0.9 + 1.8 * i / (count - 1), 2)
            Image.fromarray(subject_scene(name, rng, place=place, pose=pose).draw(256)).save(
                out / name / f"{i:02d}.png"
            )


def write_sheet(out: Path, size: int, zoom: int, columns: int, rows: int, seed: int) -> None:
    """A contact sheet of random scenes with their captions."""
    cell, line = size * zoom, 14
    sheet = Image.new("RGB", (columns * cell, rows * (cell + line)), "white")
    pen = ImageDraw.Draw(sheet)
    rng = np.random.default_rng(seed)
    for i in range(columns * rows):
        scene = Scene.random(rng)
        x, y = i % columns * cell, i // columns * (cell + line)
        picture = Image.fromarray(scene.draw(size)).resize((cell, cell), Image.Resampling.NEAREST)
        sheet.paste(picture, (x, y))
        words = scene.caption(rng).removeprefix("a photo of ").removeprefix("a picture of ")
        pen.text((x + 2, y + cell + 1), words[: cell // 6], fill="black")
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    subjects = commands.add_parser("subjects", help="write five pictures of every subject")
    subjects.add_argument("out", type=Path)
    sheet = commands.add_parser("sheet", help="write a contact sheet of random captioned scenes")
    sheet.add_argument("out", type=Path)
    for name, default in (("size", 64), ("zoom", 3), ("columns", 8), ("rows", 6), ("seed", 0)):
        sheet.add_argument(f"--{name}", type=int, default=default)
    arguments = vars(parser.parse_args())
    {"subjects": write_subjects, "sheet": write_sheet}[arguments.pop("command")](**arguments)


if __name__ == "__main__":
    main()
