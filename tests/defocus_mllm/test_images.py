"""Pictures of every kind become the RGB a viewer would show; broken ones are named."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib

import numpy
import pytest
from PIL import Image

from defocus_mllm import DefocusImageProcessor
from defocus_mllm.images import ANIMATED, ImageError, load_image

RED = (255, 0, 0)


def pixel(path, position=(0, 0)):
    image = load_image(path)
    assert image.mode == "RGB"
    return image.getpixel(position)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "CMYK", "YCbCr", "P"])
def test_colour_modes(tmp_path, mode):
    path = tmp_path / "picture.tiff"
    Image.new("RGB", (4, 3), RED).convert(mode).save(path)
    assert pixel(path) == pytest.approx(RED, abs=2)


def test_grey_bilevel_and_sixteen_bit(tmp_path):
    Image.new("L", (2, 2), 100).save(tmp_path / "grey.png")
    Image.new("1", (2, 2), 1).save(tmp_path / "bilevel.png")
    deep = numpy.array([[0, 65535], [32896, 257]], dtype=numpy.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert pixel(tmp_path / "grey.png") == (100, 100, 100)
    assert pixel(tmp_path / "bilevel.png") == (255, 255, 255)
    values = numpy.asarray(load_image(tmp_path / "deep.png"))[..., 0]
    assert values.tolist() == [[0, 255], [128, 1]]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_shows_white_not_hidden_colours(tmp_path, mode):
    image = Image.new(mode, (2, 2), (0,) * len(Image.new(mode, (1, 1)).getbands()))
    image.save(tmp_path / "clear.png")
    assert pixel(tmp_path / "clear.png") == (255, 255, 255)


def test_transparent_palette_colour_shows_white(tmp_path):
    Image.new("P", (2, 2), 5).save(tmp_path / "clear.gif", transparency=5)
    assert pixel(tmp_path / "clear.gif") == (255, 255, 255)


def test_camera_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (40, 20), "white")
    image.paste(RED, (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn 90 degrees clockwise to view
    image.save(tmp_path / "photo.jpg", exif=exif, quality=95)
    assert load_image(tmp_path / "photo.jpg").size == (20, 40)
    assert pixel(tmp_path / "photo.jpg", (16, 4)) == pytest.approx(RED, abs=30)


def test_the_format_is_told_by_content_and_the_first_frame_counts(tmp_path):
    frames = [Image.new("RGB", (2, 2), color) for color in (RED, (0, 0, 255))]
    frames[0].save(tmp_path / "animation.jpg", format="GIF", save_all=True, append_images=frames[1:])
    assert pixel(tmp_path / "animation.jpg") == RED
    assert load_image(tmp_path / "animation.jpg").info[ANIMATED]
    frames[0].save(tmp_path / "still.jpg", format="GIF")
    assert ANIMATED not in load_image(tmp_path / "still.jpg").info


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_animations_of_all_kinds_are_told(tmp_path, kind):
    frames = [Image.new("RGBA", (4, 4), color) for color in (RED, (0, 0, 255))]
    frames[0].save(tmp_path / "animation", format=kind, save_all=True, append_images=frames[1:], lossless=True)
    assert pixel(tmp_path / "animation") == RED
    assert load_image(tmp_path / "animation").info[ANIMATED]


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 1), (1, 4000), (4000, 1)])
def test_tiny_and_thin_pictures(tmp_path, size):
    Image.new("RGB", size, RED).save(tmp_path / "thin.png")
    assert load_image(tmp_path / "thin.png").size == size
    processor = DefocusImageProcessor(size={"height": 8, "width": 8})
    values = processor(images=[load_image(tmp_path / "thin.png")], return_tensors="pt")["pixel_values"]
    assert values.shape == (1, 3, 8, 8)
    assert values[0, 0].min() > values[0, 1:].max()  # red in every pixel: channels were not taken for rows


@pytest.mark.parametrize("kind", ["EPS", "TGA", "PCX", "PDF"])
def test_formats_that_data_sets_do_not_need_are_refused(tmp_path, kind):
    Image.new("RGB", (4, 4), RED).save(tmp_path / "picture.png", format=kind)
    with pytest.raises(ImageError, match=r"picture\.png is not a picture of a known format"):
        load_image(tmp_path / "picture.png")


def png_bytes() -> bytes:
    buffer = io.BytesIO()
    noise = numpy.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=numpy.uint8)
    Image.fromarray(noise).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [b"", b"not a picture", png_bytes()[:20], png_bytes()[:1500], png_bytes()[:200] + b"\0" * 99 + png_bytes()[299:]],
    ids=["empty", "text", "header cut", "data cut", "data overwritten"],
)
def test_broken_files_are_named(tmp_path, content):
    (tmp_path / "broken.png").write_bytes(content)
    with pytest.raises(ImageError, match=r"broken\.png"):
        load_image(tmp_path / "broken.png")


def test_no_damage_raises_anything_but_image_errors(tmp_path):
    whole = png_bytes()
    generator = numpy.random.default_rng(1)
    for _ in range(150):
        damaged = bytearray(whole)
        for position in generator.integers(0, len(whole), 3):
            damaged[position] = int(generator.integers(0, 256))
        (tmp_path / "damaged.png").write_bytes(damaged)
        with contextlib.suppress(ImageError):
            assert load_image(tmp_path / "damaged.png").mode == "RGB"


def test_a_missing_file_and_unclear_pixels(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        load_image(tmp_path / "gone.png")
    Image.new("F", (2, 2), 0.5).save(tmp_path / "float.tiff")
    with pytest.raises(ImageError, match=r"float\.tiff has 32-bit values"):
        load_image(tmp_path / "float.tiff")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [11_000, 60_000])
def test_decompression_bombs_are_refused_before_decoding(tmp_path, side):
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    with pytest.raises(ImageError, match=r"bomb\.png (has 11000|is too large)"):
        load_image(tmp_path / "bomb.png")
