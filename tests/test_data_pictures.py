"""Picture files of every kind that Pillow opens become upright RGB or grey; every other kind is told, not raised."""

from __future__ import annotations

import io
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from metatutor.data.images import from_folder
from metatutor.data.pictures import PictureFiles, decoded, file_bytes, picture_of


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixel(image: Image.Image, at: tuple[int, int] = (0, 0)) -> Any:
    return image.getpixel(at)


# --- pictures ---


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "ICO", "PCX"])
def test_any_format(kind: str):
    image = decoded(encoded(Image.new("RGB", (32, 32), (200, 40, 90)), kind))
    assert image.mode == "RGB" and image.size == (32, 32)
    assert np.allclose(pixel(image), (200, 40, 90), atol=3)


def test_turned_as_exif_says():
    image, exif = Image.new("RGB", (40, 20)), Image.Exif()
    image.paste((255, 255, 255), (0, 0, 20, 20))
    exif[0x0112] = 6  # the camera was held upright
    turned = decoded(encoded(image, "JPEG", exif=exif, quality=95))
    assert turned.size == (20, 40) and pixel(turned, (10, 2))[0] > 250 > 5 > pixel(turned, (10, 38))[0]


@pytest.mark.parametrize(("bits", "brightest"), [(16, 65535), (12, 4095), (10, 1023)])
def test_sixteen_bits_by_those_that_are_used(bits: int, brightest: int):
    array = np.linspace(0, brightest, 64 * 64).reshape(64, 64).astype(np.uint16)
    for kind in ("PNG", "TIFF"):
        image = decoded(encoded(Image.fromarray(array), kind))
        assert image.mode == "L"
        assert np.abs(np.asarray(image) - array * (255 / (2**bits - 1))).max() <= 0.51


def test_real_numbers_are_stretched():
    array = np.linspace(-3, 5, 64, dtype=np.float32).reshape(8, 8)
    image = np.asarray(decoded(encoded(Image.fromarray(array), "TIFF")))
    assert image[0, 0] == 0 and image[-1, -1] == 255
    array[0, 0] = np.nan
    assert np.asarray(decoded(encoded(Image.fromarray(array), "TIFF"))).max() == 255


def test_palettes_cmyk_bits_and_greys():
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    assert pixel(decoded(encoded(red.convert("P")))) == (255, 0, 0)
    assert pixel(decoded(encoded(red.convert("CMYK"), "TIFF"))) == (255, 0, 0)
    assert np.allclose(pixel(decoded(encoded(red.convert("CMYK"), "JPEG"))), (255, 0, 0), atol=3)
    assert decoded(encoded(Image.new("1", (8, 8), 1))).mode == "L"
    assert pixel(decoded(encoded(Image.new("1", (8, 8), 1)))) == 255


def test_what_is_transparent_is_white():
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert pixel(decoded(encoded(clear))) == (255, 255, 255)
    assert pixel(decoded(encoded(Image.new("LA", (8, 8), (0, 0))))) == (255, 255, 255)
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert pixel(decoded(encoded(palette, transparency=0))) == (255, 255, 255)


def test_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "TIFF", "PNG"):
        image = decoded(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))
        assert np.allclose(pixel(image), (255, 0, 0), atol=6), kind


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_large_picture_may_be_read_smaller(kind: str):
    data = encoded(Image.linear_gradient("L").resize((2400, 1600)), kind)
    assert decoded(data).size == (2400, 1600)
    small = decoded(data, 500)
    assert small.size == (750, 500)
    assert abs(pixel(small, (375, 250)) - 128) < 3
    assert decoded(encoded(Image.new("L", (20_000, 3)), kind), 100).size == (800, 3)
    assert decoded(data, 5000).size == (2400, 1600)


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises so many pixels and is a few bytes long."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    rows = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


BAD = {
    "bomb.png": (png_header(20_000, 20_000), "more than 100 million pixels"),
    "bomb120.png": (png_header(12_000, 10_000), "more than 100 million pixels"),
    "cut.png": (encoded(Image.effect_noise((64, 64), 50))[:-900], "damaged"),
    "cut.jpg": (encoded(Image.effect_noise((64, 64), 50), "JPEG")[:-900], "damaged"),
    "short.png": (png_header(64, 64), "damaged"),
    "zero.jpg": (b"", "an empty file"),
    "text.jpg": ("Nicht alles, was so heißt, ist ein Bild.".encode(), "not an image that Pillow opens"),
    "program.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "not an image"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes with four pictures in all, and one file of every bad kind."""
    for name, colours in {"crème 🍦": (10, 20), "<b>tea & cake": (30, 40)}.items():
        (tmp_path / name).mkdir()
        for colour in colours:
            Image.new("RGB", (20, 30), (colour, 0, 200)).save(tmp_path / name / f"🙂 {colour}.png")
    for file, (data, _) in BAD.items():
        (tmp_path / "crème 🍦" / file).write_bytes(data)
    return tmp_path


def test_bad_files_are_skipped_with_the_reason_and_the_rest_is_read(folder: Path):
    (folder / "crème 🍦" / "loop.jpg").symlink_to("loop.jpg")
    (folder / "crème 🍦" / "gone.jpg").symlink_to("nowhere.jpg")
    (folder / "crème 🍦" / "up").symlink_to(folder)
    (folder / "circle").symlink_to("circle")
    os.mkfifo(folder / "crème 🍦" / "pipe.jpg")
    (folder / "crème 🍦" / ".DS_Store").write_bytes(b"x")
    (folder / "notes.txt").write_text("beside the classes")
    files = PictureFiles.of(folder)
    assert sorted((p.name, p.path.name) for p in files) == [
        ("<b>tea & cake", "🙂 30.png"),
        ("<b>tea & cake", "🙂 40.png"),
        ("crème 🍦", "🙂 10.png"),
        ("crème 🍦", "🙂 20.png"),
    ]
    reasons = {path.name: reason for path, reason in files.skipped.items()}
    for file, (_, reason) in BAD.items():
        assert reasons.pop(file).startswith(reason), file
    assert "symbolic links" in reasons.pop("loop.jpg") and "No such file" in reasons.pop("gone.jpg")
    assert reasons.pop("up") == "a folder in the folder of a class"
    assert reasons.pop("pipe.jpg") == "not a regular file"
    assert all("beside the class folders" in reasons.pop(name) for name in ("notes.txt", "circle"))
    assert not reasons


def test_no_permission_is_a_reason(folder: Path, monkeypatch: pytest.MonkeyPatch):
    closed = folder / "<b>tea & cake" / "🙂 30.png"
    real = Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        if path == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    files = PictureFiles.of(folder)
    assert len(list(files)) == 3 and files.skipped[closed] == "Permission denied"


def test_equal_files_are_told(folder: Path):
    first, second = (folder / name for name in ("crème 🍦", "<b>tea & cake"))
    data = (first / "🙂 10.png").read_bytes()
    (first / "copy.png").write_bytes(data)
    (second / "other.png").write_bytes(data)
    files = PictureFiles.of(folder)
    assert len(list(files)) == 5
    assert files.skipped[first / "🙂 10.png"] == "the same file as copy.png in its class"
    assert [{path.name for path in same} for same in files.in_two_classes()] == [{"copy.png", "🙂 10.png", "other.png"}]


def test_flat_folders_and_single_files_have_no_classes(folder: Path):
    flat = PictureFiles.of(folder / "<b>tea & cake")
    assert (len(flat), flat.names) == (2, ()) and {p.name for p in flat} == {None}
    single = PictureFiles.of(folder / "crème 🍦" / "🙂 10.png")
    assert [p.image.size for p in single] == [(20, 30)]
    with pytest.raises(ValueError, match="nowhere does not exist; give a folder of pictures, or a picture$"):
        PictureFiles.of(folder / "nowhere")


def test_damaged_files_never_raise_anything_else():
    """Every byte of some pictures changed or cut off: a picture, or a ValueError of one line."""
    generator = np.random.default_rng(0)
    noise = Image.effect_noise((40, 30), 80)
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"):
        whole = encoded(noise, kind)
        for _ in range(60):
            data = bytearray(whole)
            for at in generator.integers(0, len(data), 3):
                data[at] = generator.integers(256)
            try:
                decoded(bytes(data[: generator.integers(1, len(data) + 1)]))
            except ValueError as error:
                assert str(error).isprintable()


def test_files_are_bounded(tmp_path: Path):
    path = tmp_path / "huge.jpg"
    with path.open("wb") as file:
        file.truncate(400_000_000)  # sparse
    with pytest.raises(ValueError, match="^400,000,000 bytes, expected at most 300,000,000$"):
        file_bytes(path)


# --- pictures from Python ---


def test_arrays_and_tensors_become_pictures():
    colours = np.arange(6 * 5 * 3, dtype=np.uint8).reshape(6, 5, 3)
    for image in (colours, torch.from_numpy(colours).movedim(-1, 0), Image.fromarray(colours), colours / 255):
        assert np.array_equal(np.asarray(picture_of(image)), colours)
    grey = colours[:, :, 0]
    for image in (grey, grey[None], torch.from_numpy(grey / 255.0)[None], ImageOps.grayscale(Image.fromarray(grey))):
        assert np.array_equal(np.asarray(picture_of(image)), grey)
    for bad in (np.zeros((2, 3, 4, 5)), np.zeros(5), np.zeros((5, 5, 2)), b"text", None):
        with pytest.raises(ValueError, match="^an image must be"):
            picture_of(bad)
    with pytest.raises(ValueError, match="^pixels must be floats from 0 to 1 or integers from 0 to 255, got float64"):
        picture_of(colours * 1.0)


def test_from_folder_reads_what_pictures_reads(tmp_path: Path):
    (tmp_path / "a").mkdir()
    Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(tmp_path / "a" / "deep.png")
    assert from_folder(tmp_path, image_size=4).images[0, 0, 0, 0, 0] == round(40_000 / 65_535 * 255)
