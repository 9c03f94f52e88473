"""Tensors and pictures are each other's inverse; a sheet shows every picture; a PNG is whole or not there."""

import errno

import pytest
import torch
from comparing import noise
from PIL import Image

from minibooth.diffusion import images
from minibooth.errors import UserError


def test_every_level_survives_the_way_there_and_back():
    levels = Image.fromarray(torch.arange(256, dtype=torch.uint8).reshape(16, 16).numpy()).convert("RGB")
    picture = noise(14, 9)
    assert images.to_tensor(picture).shape == (3, 9, 14)
    assert images.to_image(images.to_tensor(picture)).tobytes() == picture.tobytes()
    assert images.to_image(images.to_tensor(levels)).tobytes() == levels.tobytes()


def test_black_and_white_are_the_ends_of_the_range():
    assert torch.equal(images.to_tensor(Image.new("RGB", (2, 3), "black")), torch.full((3, 3, 2), -1.0))
    assert torch.equal(images.to_tensor(Image.new("RGB", (2, 3), "white")), torch.full((3, 3, 2), 1.0))
    red = images.to_tensor(Image.new("RGB", (1, 1), "red")).flatten()
    assert red.tolist() == [1, -1, -1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_level_is_the_nearest_one_and_stays_in_range(dtype):
    """-1.5 and 7 lie outside; 0.0039 is just under half a level above the middle, 127.5; 1.0115 is no number of bfloat16."""
    row = torch.tensor([-1.5, -1.0, 0.0039, 0.0115, 1.0, 7.0], dtype=dtype, requires_grad=True)
    picture = images.to_image(row.expand(3, 1, 6))
    assert [picture.getpixel((i, 0)) for i in range(6)] == [(level,) * 3 for level in (0, 0, 128, 129, 255, 255)]


@pytest.mark.parametrize("count, columns, cells", [(1, 4, (1, 1)), (4, 4, (4, 1)), (5, 2, (2, 3)), (6, 3, (3, 2))])
def test_a_grid_shows_every_picture_in_reading_order(count, columns, cells):
    pictures = [noise(12, 10, seed) for seed in range(count)]
    sheet = images.grid(pictures, columns)
    wide, high = cells
    assert sheet.size == (wide * 12 + (wide - 1) * images.GAP, high * 10 + (high - 1) * images.GAP)
    for i, picture in enumerate(pictures):
        x, y = i % wide * (12 + images.GAP), i // wide * (10 + images.GAP)
        assert sheet.crop((x, y, x + 12, y + 10)).tobytes() == picture.tobytes()
    if count == 5:
        assert sheet.getpixel((sheet.width - 1, sheet.height - 1)) == (255, 255, 255)


def test_a_cell_is_as_large_as_the_largest_picture():
    assert images.grid([noise(12, 10), noise(6, 20)], 2).size == (12 + images.GAP + 12, 20)


def test_a_png_holds_the_picture_and_its_texts(tmp_path):
    picture, path = noise(8, 8), tmp_path / "00.png"
    metadata = {"prompt": "a photo of sks dog", "négatif": "flou, 漢字 😀", "seed": "0"}
    images.save_png(picture, path, metadata)
    with Image.open(path) as saved:
        assert saved.format == "PNG" and saved.text == metadata and saved.tobytes() == picture.tobytes()
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_no_text_is_written_escaped(tmp_path):
    """A path may hold bytes that are no UTF-8."""
    images.save_png(noise(8, 8), tmp_path / "00.png", {"model": "caf\udce9"})
    with Image.open(tmp_path / "00.png") as saved:
        assert saved.text == {"model": "caf\\udce9"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_no_picture(value):
    pixels = torch.zeros(3, 4, 4, dtype=torch.float16)
    pixels[1, 2, 3] = value
    with pytest.raises(UserError, match=r"is not finite.*--dtype"):
        images.to_image(pixels)


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "00.png"
    images.save_png(noise(8, 8), path, {})
    before = path.read_bytes()

    def disk_full(self, file, **options):
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(Image.Image, "save", disk_full)
    with pytest.raises(OSError, match="no space") as error:
        images.save_png(noise(8, 8), path, {})
    assert error.value.filename == str(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
