"""Any photograph arrives upright, in RGB and square; what cannot be used is named before a step is made."""

import io

import numpy as np
import pytest
import torch
from comparing import noise
from PIL import Image, ImageCms, ImageOps

from minibooth.diffusion.images import to_tensor
from minibooth.dreambooth.data import INTERPOLATION, crop, find_pictures, open_picture
from minibooth.errors import UserError


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


RAMP = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))


# ---- what is a picture


def test_pictures_and_the_rest_are_told_apart_and_sorted(tmp_path):
    picture = noise(8, 8)
    for name in ("b.png", "a.PNG", "c", "d.txt", ".hidden.png", "._a.jpg"):
        (tmp_path / name).write_bytes(encoded(picture))
    (tmp_path / "e.jpg").write_bytes(encoded(picture, "WEBP"))
    for name in (".DS_Store", "Thumbs.db", "caption.txt", "metadata.json", "video.mp4", "empty"):
        (tmp_path / name).write_bytes(b"" if name == "empty" else b"a photo of a dog")
    (tmp_path / "sub.png").mkdir()
    (tmp_path / "sub.png" / "f.png").write_bytes(encoded(picture))
    pictures, skipped = find_pictures(tmp_path)
    assert [path.name for path in pictures] == ["a.PNG", "b.png", "c", "d.txt", "e.jpg"]
    assert {path.name for path in skipped} == {path.name for path in tmp_path.iterdir()} - {p.name for p in pictures}
    assert skipped == sorted(skipped)


JPEG = encoded(noise(64, 64), "JPEG")
BROKEN = {
    "truncated.jpg": JPEG[: len(JPEG) // 2],
    "truncated.png": encoded(noise(64, 64))[:5000],
    "truncated-without-suffix": JPEG[: len(JPEG) // 2],
    "zero.jpeg": b"",
    "text.png": b"not a picture",
    "zeroed.png": encoded(noise(64, 64))[:60] + bytes(3000),
    "phone.HEIC": b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(100),
    "phone.heif": b"\x00\x00\x00\x18ftypmif1\x00\x00\x00\x00mif1heic" + bytes(100),
    "phone.jxl": b"\xff\x0a" + bytes(100),
    "camera.nef": encoded(noise(16, 12), "TIFF"),
    "range.tif": encoded(Image.fromarray(np.full((4, 4), 0.5, np.float32)), "TIFF"),
    "signed.tif": encoded(Image.fromarray(np.full((4, 4), -5, np.int32)), "TIFF"),
    "drawing.jpg": encoded(noise(8, 8), "EPS"),  # which Pillow would have Ghostscript run
    "deep.tif": encoded(Image.fromarray(np.full((4, 4), 10**6, np.int32)), "TIFF"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_picture_stops_the_run_and_is_named(name, tmp_path):
    (tmp_path / "good.png").write_bytes(encoded(noise(8, 8)))
    (tmp_path / name).write_bytes(BROKEN[name])
    with pytest.raises(UserError, match="(?s)JPEG or PNG") as error:
        find_pictures(tmp_path)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_a_picture_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    (tmp_path / "bomb.png").write_bytes(encoded(noise(32, 32)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(UserError, match="bomb.png is too large"):
        find_pictures(tmp_path)


def test_a_picture_of_200_million_pixels_is_read(tmp_path, recwarn):
    """As telephones take them."""
    Image.new("1", (16320, 12240)).save(tmp_path / "large.png")
    with Image.open(tmp_path / "large.png") as picture:
        assert picture.size == (16320, 12240) and not recwarn


def test_colours_are_those_of_the_pictures_profile(tmp_path):
    """Here of one that calls sRGB's red green; a profile of another kind, or a damaged one, says nothing."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = profile.replace("sRGB".encode("utf-16-be"), "RGB?".encode("utf-16-be"))
    for red, green in ((b"rXYZ", b"gXYZ"), (b"rTRC", b"gTRC")):
        swapped = swapped.replace(red, b"????").replace(green, red).replace(b"????", green)
    picture, lab = noise(8, 8), ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for i, (own, order) in enumerate([(profile, "rgb"), (swapped, "grb"), (lab, "rgb"), (b"damaged", "rgb"), (None, "rgb")]):
        picture.save(tmp_path / f"{i}.png", icc_profile=own)
        expected = np.asarray(picture, int)[..., ["rgb".index(channel) for channel in order]]
        assert np.abs(np.asarray(open_picture(tmp_path / f"{i}.png"), int) - expected).max() <= (order == "grb")


@pytest.mark.parametrize("files", [None, [], ["notes.txt"]])
def test_a_folder_that_is_missing_or_holds_no_picture_is_an_error(files, tmp_path):
    folder = tmp_path / "instances"
    if files is not None:
        folder.mkdir()
        for name in files:
            (folder / name).write_text("a dog")
    with pytest.raises(UserError, match="instances"):
        find_pictures(folder)


# ---- upright, RGB

TURN = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90"}
TURN |= {7: "TRANSVERSE", 8: "ROTATE_270"}  # how a camera that writes this orientation stored an upright scene


@pytest.mark.parametrize("format, mode", [("PNG", "RGB"), ("TIFF", "RGB"), ("PNG", "I;16"), ("PNG", "P"), ("WEBP", "RGB")])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation, format, mode, tmp_path):
    scene = noise(12, 8)
    if mode == "I;16":
        scene = Image.fromarray(np.asarray(scene.convert("L"), dtype=np.uint16) * 257)
    elif mode == "P":
        scene = scene.quantize(16)
    stored = scene.transpose(Image.Transpose[TURN[orientation]]) if orientation in TURN else scene
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {}
    (tmp_path / "turned").write_bytes(encoded(stored, format, exif=exif, **options))
    (tmp_path / "upright").write_bytes(encoded(scene, format, **options))
    turned, upright = open_picture(tmp_path / "turned"), open_picture(tmp_path / "upright")
    assert turned.size == (12, 8)
    assert turned.tobytes() == upright.tobytes()


def grey(levels: Image.Image) -> np.ndarray:
    return np.stack([np.asarray(levels)] * 3, axis=-1)


def deep(kind: type) -> Image.Image:
    return Image.fromarray(np.asarray(RAMP, dtype=kind) * 257)


BITS = RAMP.point(lambda level: 255 * (level > 100)).convert("1")
CMYK = Image.merge("CMYK", [RAMP, RAMP.rotate(90), RAMP.rotate(180), Image.new("L", RAMP.size)])
MODES = {  # what is stored, and the levels it shows: [H, W, 3]
    "grey": (RAMP, "PNG", grey(RAMP)),
    "16-bit grey png": (deep(np.uint16), "PNG", grey(RAMP)),
    "16-bit grey tiff": (deep(np.uint16), "TIFF", grey(RAMP)),
    "16-bit grey pgm": (deep(np.uint16), "PPM", grey(RAMP)),
    "32-bit grey tiff": (deep(np.int32), "TIFF", grey(RAMP)),
    "one bit": (BITS, "PNG", grey(BITS.convert("L"))),
    "palette": (RAMP.convert("RGB").quantize(256), "PNG", np.asarray(RAMP.convert("RGB").quantize(256).convert("RGB"))),
    "cmyk": (CMYK, "TIFF", np.stack([255 - np.asarray(band) for band in CMYK.split()[:3]], axis=-1)),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_becomes_the_rgb_it_shows(name, tmp_path):
    stored, format, shown = MODES[name]
    (tmp_path / "picture").write_bytes(encoded(stored, format))
    picture = open_picture(tmp_path / "picture")
    assert picture.mode == "RGB"
    assert np.array_equal(np.asarray(picture), shown)


def test_every_16_bit_level_goes_to_the_nearest_of_8_bits(tmp_path):
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    (tmp_path / "deep.png").write_bytes(encoded(Image.fromarray(levels)))
    got = np.asarray(open_picture(tmp_path / "deep.png"))[..., 0]
    assert got.min() == 0 and got.max() == 255
    assert np.abs(got - levels / 65535 * 255).max() <= 0.5


@pytest.mark.parametrize(
    "levels", [np.arange(256, dtype=np.int32), np.array([-1, 300], np.int32), np.array([0.5, 1], np.float32)]
)
def test_grey_levels_of_unknown_range_are_refused(levels, tmp_path):
    (tmp_path / "grey.tiff").write_bytes(encoded(Image.fromarray(levels[None]), "TIFF"))
    with pytest.raises(UserError, match="grey levels of unknown range: convert it to 8 or 16 bits"):
        open_picture(tmp_path / "grey.tiff")


def see_through(mode: str) -> tuple[Image.Image, dict]:
    """Black everywhere, opaque on the left, transparent on the right."""
    alpha = Image.new("L", (8, 4), 0)
    alpha.paste(255, (0, 0, 4, 4))
    if mode in ("LA", "RGBA"):
        image = Image.new(mode[:-1], alpha.size, 0)
        image.putalpha(alpha)
        return image, {}
    if mode == "P":  # two entries, both black
        image = alpha.point(lambda level: level // 255).convert("P")
        image.putpalette([0, 0, 0] * 2)
        return image, {"transparency": 0}
    image = Image.new(mode, alpha.size, 0)  # one colour stands for transparency
    image.paste("blue" if mode == "RGB" else 9, (4, 0, 8, 4))
    return image, {"transparency": (0, 0, 255) if mode == "RGB" else 9}


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P", "L", "RGB"])
def test_transparency_shows_white(mode, tmp_path):
    image, options = see_through(mode)
    (tmp_path / "picture.png").write_bytes(encoded(image, **options))
    shown = np.asarray(open_picture(tmp_path / "picture.png"))
    assert (shown[:, :4] == 0).all() and (shown[:, 4:] == 255).all()


def test_half_transparent_black_is_grey(tmp_path):
    (tmp_path / "picture.png").write_bytes(encoded(Image.new("RGBA", (2, 2), (0, 0, 0, 128))))
    assert open_picture(tmp_path / "picture.png").getpixel((0, 0)) == (127, 127, 127)


def test_of_an_animation_the_first_frame_is_taken(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    (tmp_path / "loop.gif").write_bytes(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert open_picture(tmp_path / "loop.gif").getpixel((0, 0)) == (255, 0, 0)


# ---- squares


@pytest.mark.parametrize("size", [(64, 64), (300, 100), (100, 300), (16, 24), (7, 5), (101, 67), (64, 65)])
@pytest.mark.parametrize("center", [True, False])
def test_a_square_has_the_resolution_and_says_where_it_was(size, center):
    picture = noise(*size)
    got = crop(picture, 64, center, False, generator())
    assert got.pixels.shape == (3, 64, 64) and got.pixels.dtype == torch.float32
    assert got.original_size == size[::-1]
    scale = 64 / min(size)
    resized = picture.resize(tuple(int(side * scale + 1e-6) for side in size), Image.Resampling.LANCZOS)
    assert min(resized.size) == 64
    (top, left), whole = got.top_left, to_tensor(resized)
    assert torch.equal(got.pixels, whole[:, top : top + 64, left : left + 64])


@pytest.mark.parametrize(
    "size, corner", [((300, 100), (0, 64)), ((100, 300), (64, 0)), ((100, 100), (0, 0)), ((67, 64), (0, 2)), ((64, 67), (2, 0))]
)
def test_the_centre_is_in_the_middle(size, corner):
    assert crop(noise(*size), 64, True, False, generator()).top_left == corner


def test_random_places_repeat_with_the_generator_and_cover_the_picture():
    for picture, places in ((noise(40, 32), {(0, i) for i in range(9)}), (noise(32, 40), {(i, 0) for i in range(9)})):
        draws, again = ([crop(picture, 32, False, False, generator(seed)) for seed in range(100)] for _ in range(2))
        assert all(map(torch.equal, *([draw.pixels for draw in run] for run in (draws, again))))
        assert [draw.top_left for draw in draws] == [draw.top_left for draw in again]
        assert {draw.top_left for draw in draws} == places


def test_one_generator_gives_a_new_place_each_time_and_draws_alike_for_all_options():
    picture, states = noise(90, 32), []
    for center in (True, False):
        for flip in (True, False):
            stream = generator()
            crop(picture, 32, center, flip, stream)
            states.append(stream.get_state())
    assert all(torch.equal(state, states[0]) for state in states)
    stream = generator()
    assert len({crop(picture, 32, False, False, stream).top_left for _ in range(20)}) > 10


@pytest.mark.parametrize("center", [True, False])
def test_a_flip_mirrors_exactly_half_of_the_time(center):
    picture, flipped = noise(51, 32), 0
    for seed in range(200):
        plain, maybe = (crop(picture, 32, center, flip, generator(seed)) for flip in (False, True))
        if torch.equal(plain.pixels, maybe.pixels):
            assert plain.top_left == maybe.top_left
            continue
        flipped += 1
        assert torch.equal(maybe.pixels, plain.pixels.flip(-1))
        top, left = maybe.top_left  # in the mirrored picture
        assert torch.equal(maybe.pixels, to_tensor(ImageOps.mirror(picture))[:, top : top + 32, left : left + 32])
    assert 70 < flipped < 130


@pytest.mark.parametrize("name", INTERPOLATION)
def test_a_picture_that_fits_passes_unchanged(name):
    picture = noise(16, 16)
    assert torch.equal(crop(picture, 16, False, False, generator(), name).pixels, to_tensor(picture))


@pytest.mark.parametrize("name", [name for name in INTERPOLATION if name != "nearest"])
def test_shrinking_averages_instead_of_dropping_pixels(name):
    """A fine checkerboard becomes grey; a filter without antialiasing would keep black or white."""
    board = Image.fromarray((np.indices((128, 128)).sum(0) % 2 * 255).astype(np.uint8)).convert("RGB")
    pixels = crop(board, 16, True, False, generator(), name).pixels
    assert pixels[:, 2:-2, 2:-2].abs().max() < 0.1
    assert crop(board, 16, True, False, generator(), "nearest").pixels.abs().min() == 1
