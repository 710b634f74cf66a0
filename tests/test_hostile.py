"""Untrusted downloads: what is damaged or made to hurt is set aside or refused by name, and what lies beside it is unchanged."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from lvm_ray.errors import BadItem, UserError
from lvm_ray.sources import Source, coco, files, sa1b, tar
from lvm_ray.sources.coco import CocoInstances, CocoKeypoints
from lvm_ray.sources.files import decode_image, read_image, read_mask
from lvm_ray.sources.folders import ImageFolder, MaskFolders, PictureFolders, RainFolders
from lvm_ray.sources.lmdb_pairs import PairLmdb
from lvm_ray.sources.sa1b import Sa1bTars
from lvm_ray.sources.video import VideoFrames
from lvm_ray.sources.webdataset import WebdatasetTars
from lvm_ray.tasks import Segmentation
from lvm_ray.tasks.objects import Objects
from tests import layouts
from tests.layouts import (
    encoded,
    good_sa1b_pair,
    listing,
    make_lmdb,
    make_tar,
    mask_of,
    member,
    person,
    picture,
    rle_of,
    sa1b_pair,
    same,
    write,
)

Members = list[tuple[tarfile.TarInfo, bytes]]


class Bomb:
    """A pickle that runs code where it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def png_of_declared_size(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def object_array() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([Bomb(Path("never"))], dtype=object), allow_pickle=True)
    return stream.getvalue()


def result(source: Source) -> tuple[dict[str, Any], list[str]]:
    """(loaded samples by id, reasons of everything set aside, at the listing or at loading)."""
    items, reasons = listing(source)
    good: dict[str, Any] = {}
    for item in items:
        try:
            good[item.id] = source.load(item)
        except BadItem as error:
            reasons.append(str(error))
    return good, reasons


def assert_only_good(found: dict[str, Any], alone: dict[str, Any]) -> None:
    assert found.keys() == alone.keys() and all(same(found[name], alone[name]) for name in alone)


# Image files: unusable ones


SMOOTH = np.asarray(Image.fromarray(picture(3, 8, 8)).resize((64, 64)))
UNUSABLE: dict[str, tuple[bytes, str]] = {
    "truncated png": (encoded(SMOOTH)[:-400], "cannot be read as an image"),
    "truncated jpeg": (encoded(SMOOTH, "JPEG")[:-500], "truncated"),
    "truncated webp": (encoded(SMOOTH, "WEBP")[:-300], "cannot be read as an image"),
    "png cut inside its header": (encoded(SMOOTH)[:20], "cannot be read as an image"),
    "zero bytes": (b"", "empty file"),
    "text": (b"<html><script>alert(1)</script>", "cannot identify"),
    "decompression bomb": (png_of_declared_size(30_000, 30_000), "cannot be read|pixels"),
    "more pixels than are read": (png_of_declared_size(8_001, 8_000), "8001x8000 pixels; at least one and at most 64,000,000"),
    "no pixels": (png_of_declared_size(0, 5), "cannot be read as an image|0x5"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "cannot identify"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>", "cannot identify"),
    "pickle": (pickle.dumps(Bomb(Path("never"))), "cannot identify"),
    "numpy objects": (object_array(), "cannot identify"),
    "gzip": (b"\x1f\x8b\x08\x00" + bytes(60), "cannot identify"),
    "random bytes after a png head": (encoded(SMOOTH)[:33] + np.random.default_rng(0).bytes(500), "cannot be read as an image"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_an_unusable_image_file_is_set_aside_and_the_others_are_as_they_are_alone(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(write(tmp_path / "here" / "x", b"").parent)
    for i in range(3):
        write(tmp_path / "images" / f"{i}.png", encoded(picture(i)))
    source = ImageFolder(images=str(tmp_path / "images"))
    alone, _ = result(source)
    content, reason = UNUSABLE[name]
    write(tmp_path / "images" / "1b.png", content)
    found, reasons = result(source)
    assert_only_good(found, alone)
    assert len(reasons) == 1 and "1b.png" in reasons[0] and "\n" not in reasons[0]
    with pytest.raises(BadItem, match=reason):
        read_image(str(tmp_path / "images" / "1b.png"))
    assert os.listdir() == ["x"]  # nothing was written, no pickle ran


def test_a_file_of_too_many_bytes_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LARGEST_BYTES", 1000)
    write(tmp_path / "small.png", encoded(picture(0, 4, 4)))
    write(tmp_path / "large.png", encoded(picture(0, 40, 40)))
    found, reasons = result(ImageFolder(images=str(tmp_path)))
    assert list(found) == ["small"] and "at most 1,000 are read" in reasons[0]


# Image files: unusual ones that are perfectly usable


def saved(image: Image.Image, format: str = "PNG", **settings: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **settings)
    return stream.getvalue()


RGB = picture(5)
GREY = RGB[..., 0]
ALPHA = np.where(np.arange(16) < 8, 255, 0).astype(np.uint8)[None].repeat(12, 0)
ON_WHITE = np.where(ALPHA[..., None] > 0, RGB, 255)
FLAT = np.full((16, 16, 3), (200, 40, 90), np.uint8)


def palette_image(transparent: bool) -> bytes:
    image = Image.fromarray((np.arange(192) % 3).astype(np.uint8).reshape(12, 16), mode="P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    return saved(image, transparency=1) if transparent else saved(image)


PALETTE = np.eye(3, dtype=np.uint8)[(np.arange(192) % 3).reshape(12, 16)] * 255
RED, BLUE = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
RED_PIXELS = np.full((4, 4, 3), (255, 0, 0), np.uint8)
USABLE: dict[str, tuple[bytes, np.ndarray, int]] = {
    "1x1": (encoded(RGB[:1, :1]), RGB[:1, :1], 0),
    "one row": (encoded(RGB[:1]), RGB[:1], 0),
    "cmyk jpeg": (saved(Image.fromarray(FLAT).convert("CMYK"), "JPEG", quality=100), FLAT, 6),
    "grey": (encoded(GREY), GREY[..., None].repeat(3, -1), 0),
    "16-bit grey": (saved(Image.fromarray(GREY.astype(np.uint16) * 257)), GREY[..., None].repeat(3, -1), 0),
    "1-bit": (saved(Image.fromarray(GREY > 127)), np.where(GREY > 127, 255, 0)[..., None].repeat(3, -1), 0),
    "float tiff": (saved(Image.fromarray(GREY / np.float32(255)), "TIFF"), GREY[..., None].repeat(3, -1), 0),
    "palette": (palette_image(False), PALETTE, 0),
    "palette with a transparent colour": (palette_image(True), np.where(PALETTE[..., 1:2] > 0, 255, PALETTE), 0),
    "rgba": (encoded(np.concatenate([RGB, ALPHA[..., None]], -1)), ON_WHITE, 0),
    "grey and alpha": (
        saved(Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(ALPHA)])),
        np.where(ALPHA > 0, GREY, 255)[..., None].repeat(3, -1),
        0,
    ),
    "animated gif": (saved(RED, "GIF", save_all=True, append_images=[BLUE]), RED_PIXELS, 0),
    "animated png": (saved(RED, "PNG", save_all=True, append_images=[BLUE]), RED_PIXELS, 0),
    "animated webp": (saved(RED, "WEBP", save_all=True, append_images=[BLUE], lossless=True), RED_PIXELS, 0),
    "tiff of two pages": (saved(RED, "TIFF", save_all=True, append_images=[BLUE]), RED_PIXELS, 0),
    "a jpeg named png": (saved(Image.fromarray(FLAT), "JPEG", quality=100), FLAT, 6),
    "damaged exif": (saved(Image.fromarray(RGB), exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 40), RGB, 0),
    "bytes after the end": (encoded(RGB) + pickle.dumps(Bomb(Path("never"))), RGB, 0),
}


@pytest.mark.parametrize("name", USABLE)
def test_an_unusual_image_is_read_right(name: str, tmp_path: Path) -> None:
    content, wanted, tolerance = USABLE[name]
    pixels = read_image(str(write(tmp_path / "a.png", content)))
    assert pixels.dtype == np.uint8 and pixels.shape == wanted.shape
    assert np.abs(pixels.astype(int) - wanted.astype(int)).max() <= tolerance


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_an_image_is_turned_upright_by_its_exif(orientation: int, format: str) -> None:
    image = Image.fromarray(np.asarray(Image.fromarray(picture(1, 3, 4)).resize((64, 48))))
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = saved(image, format, exif=exif)
    with Image.open(io.BytesIO(content)) as opened:
        wanted = np.array(ImageOps.exif_transpose(opened))
    assert np.array_equal(decode_image(content, "x"), wanted)
    assert wanted.shape[:2] == ((48, 64) if orientation < 5 else (64, 48))


# Masks


IDS = (np.arange(192) % 3).astype(np.uint8).reshape(12, 16)
MASKS: dict[str, tuple[bytes, str]] = {
    "of an unknown class": (encoded(IDS + 5), "class id [567] is neither one of the 2 classes"),
    "of another size": (encoded(IDS[:9]), "16x9 pixels, its image 16x12"),
    "of deep values": (saved(Image.fromarray(IDS.astype(np.uint16) * 300)), "found 600 in a 16-bit image"),
    "in colours": (encoded(picture(2)), "expected|indexed or 8-bit grey image"),
    "truncated": (encoded(picture(2, 60, 60)[..., 0])[:-100], "cannot be read as an image"),
    "floating point": (saved(Image.fromarray(IDS.astype(np.float32)), "TIFF"), "found mode F"),
    "a pickle": (pickle.dumps(Bomb(Path("never"))), "cannot identify"),
}


@pytest.mark.parametrize("name", MASKS)
def test_an_unusable_mask_is_set_aside(name: str, tmp_path: Path) -> None:
    for i in range(2):
        write(tmp_path / "images" / f"{i}.png", encoded(picture(i)))
        write(tmp_path / "masks" / f"{i}.png", encoded(IDS))
    train = {"images": str(tmp_path / "images"), "masks": str(tmp_path / "masks")}
    task = Segmentation.model_validate({"classes": ["a", "b"], "train": train})
    first, second = task.items("train")
    alone = task.load(first, "train")
    content, reason = MASKS[name]
    write(tmp_path / "masks" / "1.png", content)
    with pytest.raises(BadItem, match=reason):
        task.load(second, "train")
    assert same(task.load(first, "train"), alone)


def test_a_16_bit_mask_of_small_ids_is_read(tmp_path: Path) -> None:
    assert np.array_equal(read_mask(str(write(tmp_path / "m.png", saved(Image.fromarray(IDS.astype(np.uint16)))))), IDS)


BINARY: dict[str, np.ndarray | Image.Image] = {
    "0 and 1": (IDS == 1).astype(np.uint8),
    "0 and 255": (IDS == 1).astype(np.uint8) * 255,
    "1-bit": IDS == 1,
    "indexed": Image.fromarray((IDS == 1).astype(np.uint8), mode="P"),
    "black and white in RGB": np.where(IDS[..., None] == 1, 255, 0).astype(np.uint8).repeat(3, -1),
    "0 and 1 of 16 bits": (IDS == 1).astype(np.uint16),
    "0 and 65535": (IDS == 1).astype(np.uint16) * 65535,
    "more values": np.array([0, 254, 3], np.uint8)[IDS],
}


@pytest.mark.parametrize("name", BINARY)
def test_a_binary_mask_has_the_class_where_its_larger_value_is(name: str, tmp_path: Path) -> None:
    image = BINARY[name]
    path = write(tmp_path / "m.png", saved(image if isinstance(image, Image.Image) else Image.fromarray(image)))
    assert np.array_equal(read_mask(str(path), binary=True), IDS == 1)


@pytest.mark.parametrize(("value", "wanted"), [(0, 0), (1, 1), (2, 0), (127, 0), (128, 1), (255, 1)])
def test_a_binary_mask_of_one_value_is_empty_or_full(value: int, wanted: int, tmp_path: Path) -> None:
    path = write(tmp_path / "m.png", encoded(np.full((4, 5), value, np.uint8)))
    assert (read_mask(str(path), binary=True) == wanted).all()


def test_a_binary_mask_in_colours_is_set_aside(tmp_path: Path) -> None:
    with pytest.raises(BadItem, match=r"m\.png: a binary mask is black and white, grey or indexed, found colours"):
        read_mask(str(write(tmp_path / "m.png", encoded(PALETTE))), binary=True)
    deep = saved(Image.fromarray(IDS.astype(np.uint16) * 300))
    with pytest.raises(BadItem, match="a binary mask of 16 bits has two values, found 3"):
        read_mask(str(write(tmp_path / "m.png", deep)), binary=True)


@pytest.mark.parametrize("value", [-0.1, 1.01, 5.0, 200.0])
def test_floating_point_beyond_0_to_1_needs_a_white(value: float, tmp_path: Path) -> None:
    pixels = np.full((12, 16), 0.5, np.float32)
    pixels[0, 0] = value
    write(tmp_path / "images" / "a.png", encoded(RGB))
    write(tmp_path / "labels" / "a.tif", saved(Image.fromarray(pixels), "TIFF"))
    places = {"images": str(tmp_path / "images"), "labels": str(tmp_path / "labels")}
    assert re.search(
        r"a\.tif: holds values from .* of which 0 to 1 can be shown: set `white`", result(PictureFolders(**places))[1][0]
    )
    label = result(PictureFolders(**places, white=10.0))[0]["a"].label
    assert label[1, 1, 0] == 13 and label[0, 0, 0] == np.clip(round(value * 25.5), 0, 255)


def test_32_bit_integers_beyond_16_bits_need_a_white(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.tif", saved(Image.fromarray(np.full((4, 4), 100_000, np.int32)), "TIFF")))
    with pytest.raises(BadItem, match="holds values from 100000 to 100000, of which 0 to 65535 can be shown: set `white`"):
        read_image(path)
    assert (read_image(path, 200_000) == 128).all()


# Folders and names


def test_names_that_clash_stop_only_what_is_made_by_name(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.png", "b.png", "c.png", "c.png.png"):
        write(tmp_path / "images" / name, encoded(picture(len(name))))
    items, problems = listing(ImageFolder(images=str(tmp_path / "images")))
    assert [item.id for item in items] == ["a.jpg", "a.png", "b", "c", "c.png.png"] and not problems
    assert [item.original for item in items][:3] == ["a", "a", "b"]  # one picture in two formats stays in one split
    assert [item.id for item in listing(ImageFolder(images=f"{tmp_path}/*"))[0]][:3] == [
        "images/a.jpg",
        "images/a.png",
        "images/b",
    ]
    with pytest.raises(UserError, match=r"a\.jpg and .*a\.png have the same name; pairs are made by name: rename one"):
        listing(MaskFolders(images=str(tmp_path / "images"), masks=str(tmp_path / "images")))


def test_names_that_clash_in_a_coco_folder_keep_their_ending(tmp_path: Path) -> None:
    images = [{"id": 1, "file_name": "000000000001.jpg"}, {"id": 2, "file_name": "000000000001.png"}]
    annotations = [person(1), person(2, image=2)]
    named = fields(tmp_path, annotations, images)
    write(tmp_path / "images" / "000000000001.png", encoded(picture(7)))
    found, reasons = result(CocoKeypoints(**named, people="all"))
    assert list(found) == ["000000000001.jpg", "000000000001.png"] and not reasons
    assert np.array_equal(found["000000000001.png"].image, picture(7))


def test_names_that_cannot_be_printed_are_set_aside_and_html_is_only_a_name(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path)
    for name in (b"good.png", b"\xff\xfe.png", b"two\nlines.png", b"\x1b[2J.png", "turned\u202egnp.png".encode(), b"<b>&'.png"):
        with open(folder + b"/" + name, "wb") as stream:
            stream.write(encoded(picture(0)))
    found, reasons = result(ImageFolder(images=str(tmp_path)))
    assert list(found) == ["<b>&'", "good"]
    assert len(reasons) == 4 and all("not UTF-8 or holds control characters" in reason for reason in reasons)
    assert all(reason.isprintable() for reason in reasons)


def test_names_that_cannot_be_printed_are_set_aside_in_pairs_and_in_clips(tmp_path: Path) -> None:
    for kind in (b"rainy", b"clean", b"clips/\xff"):
        os.makedirs(os.fsencode(tmp_path) + b"/" + kind)
        for name in (b"a.png", b"\xff.png"):
            with open(os.fsencode(tmp_path) + b"/" + kind + b"/" + name, "wb") as stream:
                stream.write(encoded(picture(0)))
    for i in range(2):
        write(tmp_path / "clips" / "good" / f"{i}.png", encoded(picture(i)))
    found, reasons = result(RainFolders(rainy=str(tmp_path / "rainy"), clean=str(tmp_path / "clean")))
    assert list(found) == ["a"] and len(reasons) == 1
    found, reasons = result(VideoFrames(clips=str(tmp_path / "clips"), length=2))
    assert list(found) == ["good/000000"] and "not UTF-8" in reasons[0]


def test_a_dangling_link_a_pipe_and_a_folder_of_an_image_s_name_stop_nothing(tmp_path: Path) -> None:
    write(tmp_path / "a.png", encoded(picture(0)))
    (tmp_path / "b.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "c.png").mkdir()
    os.mkfifo(tmp_path / "d.png")
    (tmp_path / "e.png").symlink_to("/dev/zero")
    found, reasons = result(ImageFolder(images=str(tmp_path)))
    assert list(found) == ["a"]
    assert [reason.split("/")[-1] for reason in reasons] == [f"{name}.png: cannot be read: no such file" for name in "bde"]


SOURCES: dict[str, Callable[[str], Source]] = {
    "images": lambda place: ImageFolder(images=place),
    "masks": lambda place: MaskFolders(images=place, masks=place),
    "coco": lambda place: CocoKeypoints(images=place, annotations=f"{place}/a.json"),
    "coco-instances": lambda place: CocoInstances(images=place, annotations=f"{place}/a.json"),
    "sa1b": lambda place: Sa1bTars(tars=place),
    "webdataset": lambda place: WebdatasetTars(tars=place),
    "lmdb": lambda place: PairLmdb(degraded=place, clean=place),
    "frames": lambda place: VideoFrames(clips=place),
}


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("there", [True, False])
def test_an_empty_or_missing_folder_is_refused_by_its_key(name: str, there: bool, tmp_path: Path) -> None:
    if there:
        (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"tasks\.toy\.train.*folder") as caught:
        listing(SOURCES[name](str(tmp_path / "folder")))
    assert "\n" not in str(caught.value) and not isinstance(caught.value, BadItem)


# Tars


def header(name: str, size: bytes) -> bytes:
    """A tar header with a size of one's own, and the checksum that fits it."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = size.ljust(12, b"\0")
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    return bytes(block)


JPEG = encoded(picture(9), "JPEG")
BAD_MEMBERS: dict[str, tuple[Members, str]] = {
    "upwards": ([member("../../sa_9.jpg", JPEG)], r"\.\./\.\./sa_9\.jpg leads out of the tar"),
    "upwards within": ([member("a/../../../sa_9.jpg", JPEG)], "leads out of the tar"),
    "absolute": ([member("/etc/sa_9.jpg", JPEG)], "/etc/sa_9.jpg leads out of the tar"),
    "symbolic link": ([member("sa_9.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd")], "sa_9.jpg is a symbolic link"),
    "hard link": ([member("sa_9.jpg", type=tarfile.LNKTYPE, linkname="sa_1.jpg")], "sa_9.jpg is a hard link"),
    "device": ([member("sa_9.jpg", type=tarfile.CHRTYPE, devmajor=1, devminor=5)], "sa_9.jpg is a device"),
    "pipe": ([member("sa_9.jpg", type=tarfile.FIFOTYPE)], "sa_9.jpg is a pipe"),
    "unknown kind": ([member("sa_9.jpg", JPEG, type=b"Q")], "sa_9.jpg is no plain file"),
    "twice": ([member("./sa_1.jpg", JPEG)], "the name sa_1.jpg stood before"),
    "twice in another folder": ([member("x/sa_1.jpg", JPEG)], "two members sa_1.jpg"),
    "not utf-8": ([member("sa_\udcff.jpg", JPEG)], r"sa_\\xff\.jpg: its name is not UTF-8"),
    "two lines": ([member("sa_9\n.jpg", JPEG)], r"sa_9\\n\.jpg: its name .* holds control characters"),
    "without json": ([member("sa_9.jpg", JPEG)], r"sa_9\.jpg has no sa_9\.json beside it"),
    "without image": ([member("sa_9.json", b"{}")], r"sa_9\.json has no sa_9\.jpg beside it"),
}


@pytest.mark.parametrize("name", BAD_MEMBERS)
def test_a_hostile_member_is_set_aside_and_nothing_is_unpacked(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(write(tmp_path / "here" / "x", b"").parent)
    alone, _ = result(Sa1bTars(tars=str(make_tar(tmp_path / "alone" / "t.tar", good_sa1b_pair(1) + good_sa1b_pair(2)))))
    members, reason = BAD_MEMBERS[name]
    mixed = [*good_sa1b_pair(1), *members, *good_sa1b_pair(2)]
    found, reasons = result(Sa1bTars(tars=str(make_tar(tmp_path / "mixed" / "t.tar", mixed, tarfile.GNU_FORMAT))))
    assert_only_good(found, alone)
    assert len(reasons) == 1 and "\n" not in reasons[0]
    assert re.search(reason, reasons[0]), reasons[0]
    assert os.listdir() == ["x"] and sorted(os.listdir(tmp_path)) == ["alone", "here", "mixed"]


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut inside a member": (lambda content: content[: second_pair(content) + 700], "the tar ends before"),
    "cut inside a header": (lambda content: content[: second_pair(content) + 100], "without a tar's end mark"),
    "cut between members": (lambda content: content[: second_pair(content)], "without a tar's end mark"),
    "garbage for a header": (
        lambda content: content[: second_pair(content)] + b"\x99" * 512 + content[second_pair(content) + 512 :],
        "damaged at byte",
    ),
    "huge size": (
        lambda content: content[: second_pair(content)] + header("sa_2.jpg", b"77777777777") + bytes(1024),
        "should have 8,589,934,591 bytes",
    ),
    "negative size": (
        lambda content: content[: second_pair(content)] + header("sa_2.jpg", b"\xff" * 12) + bytes(1024),
        "the tar ends before|damaged",
    ),
    "endless long name": (
        lambda content: content[: second_pair(content)] + long_name_header(2**21) + bytes(2**21 + 1024),
        "a header of 2,097,152 bytes",
    ),
    "two tars in one file": (lambda content: content[: second_pair(content)] + bytes(2048) + bytes(2**21), "after its end mark"),
}


def second_pair(content: bytes) -> int:
    return content.index(b"./sa_2.jpg")


def long_name_header(size: int) -> bytes:
    block = bytearray(header("././@LongLink", f"{size:011o}".encode()))
    block[156:157] = b"L"
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    return bytes(block)


@pytest.mark.parametrize("name", DAMAGES)
def test_members_before_the_damage_of_a_tar_are_read_and_the_damage_is_said(name: str, tmp_path: Path) -> None:
    whole = make_tar(tmp_path / "whole.tar", good_sa1b_pair(1) + good_sa1b_pair(2)).read_bytes()
    alone, _ = result(Sa1bTars(tars=str(make_tar(tmp_path / "t.tar", good_sa1b_pair(1)))))
    damage, reason = DAMAGES[name]
    write(tmp_path / "t.tar", damage(whole))
    found, reasons = result(Sa1bTars(tars=str(tmp_path / "t.tar")))
    assert_only_good(found, alone)
    assert re.search(reason, "\n".join(reasons)), reasons
    assert all(str(tmp_path / "t.tar") in text for text in reasons)


def test_a_compressed_tar_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "sa_1.tar", "w:gz") as stream:
        for info, content in good_sa1b_pair(1):
            stream.addfile(info, io.BytesIO(content))
    with pytest.raises(UserError, match=r"sa_1\.tar: it is compressed: unpack it with gunzip"):
        listing(Sa1bTars(tars=str(tmp_path)))
    make_tar(tmp_path / "sa_2.tar", good_sa1b_pair(2))
    found, reasons = result(Sa1bTars(tars=str(tmp_path)))
    assert list(found) == ["sa_2/sa_2"] and "gunzip" in reasons[0]


def test_members_and_jsons_of_too_many_bytes_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar, "LARGEST_BYTES", 5000)
    monkeypatch.setattr(sa1b, "LARGEST_JSON", 2000)
    members = [member("sa_3.jpg", bytes(5001)), member("sa_4.jpg", JPEG), member("sa_4.json", bytes(2001)), *good_sa1b_pair(1)]
    found, reasons = result(Sa1bTars(tars=str(make_tar(tmp_path / "t.tar", members))))
    assert list(found) == ["t/sa_1"] and len(reasons) == 2
    assert "sa_3.jpg has 5,001 bytes; at most 5,000" in reasons[0] and "sa_4.json has 2,001 bytes; at most 2,000" in reasons[1]


def test_a_tar_that_became_shorter_after_the_listing_is_no_crash(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "t.tar", good_sa1b_pair(1))
    source = Sa1bTars(tars=str(path))
    (item,) = listing(source)[0]
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(BadItem, match="bytes are there"):
        source.load(item)


def test_webdataset_s_hostile_members_are_set_aside(tmp_path: Path) -> None:
    good = [member("000000001.jpg", JPEG), member("000000001.txt", b"caption")]
    alone, _ = result(WebdatasetTars(tars=str(make_tar(tmp_path / "alone" / "00000.tar", good))))
    bad = [
        member("000000002.jpg", pickle.dumps(Bomb(tmp_path / "never"))),
        member("000000001.png", encoded(picture(1))),
        member("000000003.pyd", pickle.dumps(Bomb(tmp_path / "never"))),
        member("../000000004.jpg", JPEG),
    ]
    found, reasons = result(WebdatasetTars(tars=str(make_tar(tmp_path / "mixed" / "00000.tar", [*good, *bad]))))
    assert_only_good(found, alone)
    expected = (
        "000000001.png is a second image of 00000/000000001",
        "../000000004.jpg leads out",
        "00000/000000002: cannot be read as an image",
    )
    assert len(reasons) == 3 and all(part in reason for part, reason in zip(expected, reasons, strict=True))
    assert not (tmp_path / "never").exists()


# Run-length codes, polygons and SA-1B's JSON


GOOD_CODE = rle_of(mask_of(12, 16, (1, 2, 3, 4)))


def code(**changes: Any) -> dict[str, Any]:
    return {**GOOD_CODE, **changes}


CODES: dict[str, tuple[Any, str]] = {
    "overruns": (code(counts=rle_of(mask_of(1200, 1600, (1, 2, 3, 4)))["counts"]), "do not fill the image's 192 pixels"),
    "falls short": (code(counts="1"), "do not fill"),
    "of another size": (rle_of(mask_of(16, 12, (1, 2, 3, 4))), r"of size \[16, 12\], the image is \[12, 16\]"),
    "of a huge size": (code(size=[2**31, 2**31]), "the image is"),
    "of a size of text": (code(size="12x16"), "of size 12x16"),
    "negative run": (code(counts=[-4, 196]), "do not fill"),
    "negative compressed run": (code(counts="O\\6P"), "do not fill|damaged"),
    "garbage": (code(counts="\x00\x01zzzz\xff"), "damaged"),
    "not ascii": (code(counts="日本"), "damaged"),
    "ends inside a run": (code(counts="PPP"), "damaged"),
    "run of very many digits": (code(counts="P" * 40 + "0"), "too long"),
    "runs that come round": (code(counts=[2**63 - 1, 2**63 - 1, 194]), "do not fill"),
    "run beyond 64 bits": (code(counts=[2**70]), "too long"),
    "empty": (code(counts=""), "damaged"),
    "no runs": (code(counts=[]), "do not fill"),
    "runs of text": (code(counts=["12", "180"]), "a text or whole numbers"),
    "runs that are not whole": (code(counts=[0.5, 191.5]), "a text or whole numbers"),
    "nothing": (None, "is \\{size, counts\\}"),
    "a list": ([1, 2, 3], "is \\{size, counts\\}"),
}


@pytest.mark.parametrize("name", CODES)
def test_a_hostile_run_length_code_never_reaches_the_decoder(name: str, tmp_path: Path) -> None:
    segmentation, reason = CODES[name]
    alone, _ = result(Sa1bTars(tars=str(make_tar(tmp_path / "alone" / "t.tar", good_sa1b_pair(1)))))
    bad = sa1b_pair(2, [mask_of(12, 16, (0, 0, 5, 5))], segmentation=segmentation)
    found, reasons = result(Sa1bTars(tars=str(make_tar(tmp_path / "mixed" / "t.tar", bad + good_sa1b_pair(1)))))
    assert_only_good(found, alone)
    assert len(reasons) == 1 and "sa_2.json: annotation 2000" in reasons[0]
    assert re.search(reason, reasons[0]), reasons[0]


JSONS: dict[str, tuple[bytes, str]] = {
    "broken": (b'{"annotations": [', "is not JSON"),
    "nested deeply": (b"[" * 200_000, "nested too deeply"),
    "objects nested deeply": (b'{"a":' * 200_000, "nested too deeply"),
    "a number of many digits": (b'{"annotations": ' + b"9" * 5000 + b"}", "is not JSON"),
    "not utf-8": (b'{"\xff": 1}', "is not JSON"),
    "a list": (b"[]", "has no list `annotations`"),
    "annotations of text": (b'{"annotations": "abc"}', "has no list `annotations`"),
    "an annotation of text": (b'{"annotations": ["abc"]}', "annotation 0 is no object"),
    "no annotations": (b'{"annotations": []}', "no annotation covers a pixel"),
    "empty": (b"", "is not JSON"),
    "pickle": (pickle.dumps(Bomb(Path("never"))), "is not JSON"),
    "numpy objects": (object_array(), "is not JSON"),
}


@pytest.mark.parametrize("name", JSONS)
def test_a_hostile_json_in_a_tar_is_set_aside(name: str, tmp_path: Path) -> None:
    content, reason = JSONS[name]
    alone, _ = result(Sa1bTars(tars=str(make_tar(tmp_path / "alone" / "t.tar", good_sa1b_pair(1)))))
    bad = [member("sa_2.jpg", encoded(picture(2), "JPEG")), member("sa_2.json", content)]
    found, reasons = result(Sa1bTars(tars=str(make_tar(tmp_path / "mixed" / "t.tar", bad + good_sa1b_pair(1)))))
    assert_only_good(found, alone)
    assert len(reasons) == 1 and "sa_2.json" in reasons[0] and reason in reasons[0]


def instance(number: int, segmentation: Any, **changes: Any) -> dict[str, Any]:
    return {"id": number, "image_id": 1, "category_id": 18, "iscrowd": 0, "segmentation": segmentation, **changes}


SQUARE = [2, 3, 8, 3, 8, 7, 2, 7]
INSTANCES: dict[str, tuple[dict[str, Any], str]] = {
    "nan in a polygon": (instance(5, [[2.0, float("nan"), 8, 3, 8, 7]]), "not finite"),
    "infinity in a polygon": (instance(5, [[2.0, float("inf"), 8, 3, 8, 7]]), "not finite"),
    "two points": (instance(5, [[1, 2, 3, 4]]), "a polygon holds 4 numbers"),
    "an odd number of numbers": (instance(5, [[1, 2, 3, 4, 5, 6, 7]]), "a polygon holds 7 numbers"),
    "text in a polygon": (instance(5, [["1", 2, 3, 4, 5, 6]]), "a list of numbers"),
    "points far away": (instance(5, [[0, 0, 1e9, 0, 1e9, 1e9]]), "beyond it"),
    "an endless outline": (instance(5, [[0, 0, 15, 11] * 50_000]), "outline is longer"),
    "a number beyond floats": (instance(5, [[10**400, 2, 3, 4, 5, 6]]), "too large"),
    "no polygon": (instance(5, []), "neither polygons nor"),
    "a number": (instance(5, 7), "neither polygons nor"),
    "overrunning code": (instance(5, {"size": [12, 16], "counts": [0, 4000]}), "do not fill"),
    "code of another size": (instance(5, {"size": [120, 160], "counts": [0, 19200]}), "of size [120, 160]"),
    "unknown image": (instance(5, [SQUARE], image_id=77), "of image 77, which `images` lacks"),
    "image of a list": (instance(5, [SQUARE], image_id=[1]), "which `images` lacks"),
    "no id": ({"image_id": 1, "category_id": 18, "segmentation": [SQUARE]}, "has no usable id"),
    "second of an id": (instance(9, [SQUARE]), "two annotations have the id 9"),
    "absent image": (instance(5, [SQUARE], image_id=3), "'../../etc/passwd', which is not in"),
}


@pytest.mark.parametrize("category", [99, [18], None])
def test_an_object_of_no_category_is_an_object_and_no_class(category: Any, tmp_path: Path) -> None:
    images = [{"id": i, "file_name": f"{i:012d}.jpg", "height": 12, "width": 16} for i in (1, 2)]
    source = fields(tmp_path, [instance(5, [SQUARE], category_id=category), instance(9, [SQUARE], image_id=2)], images)
    found, reasons = result(CocoInstances(**source))
    assert not reasons and sorted(str(sample.label[0].category) for sample in found.values()) == ["None", "dog"]
    section = {"format": "coco-instances", **source}
    task = Segmentation.model_validate({"classes": ["dog"], "train": section})
    first, second = task.items("train")
    assert task.load(second, "train").label.max() == 1
    with pytest.raises(BadItem, match="none of the file's categories"):
        task.load(first, "train")
    assert Objects.model_validate({"train": section}).load(first, "train").label.max() == 1


def test_a_class_that_the_file_does_not_know_is_named(tmp_path: Path) -> None:
    source = {"format": "coco-instances", **layouts.coco(tmp_path, [instance(9, [SQUARE])])}
    task = Segmentation.model_validate({"classes": ["dog", "Person"], "train": source})
    with pytest.raises(
        UserError, match=r"tasks.segmentation.classes: 'Person' is none of the categories .*: there are person, dog"
    ):
        next(task.items("train"))


@pytest.mark.parametrize("name", INSTANCES)
def test_a_hostile_object_makes_its_image_unusable_and_no_other(name: str, tmp_path: Path) -> None:
    annotation, reason = INSTANCES[name]
    images = [{"id": i, "file_name": f"{i:012d}.jpg", "height": 12, "width": 16} for i in (1, 2)]
    images.append({"id": 3, "file_name": "../../etc/passwd"})
    good = instance(9, [SQUARE], image_id=2)
    alone, none = result(CocoInstances(**fields(tmp_path, [good], images)))
    found, reasons = result(CocoInstances(**fields(tmp_path, [good, annotation], images)))
    assert not none and len(reasons) == 1 and reason in reasons[0]
    assert_only_good(found, alone)


def fields(folder: Path, annotations: list[Any], images: Any) -> dict[str, str]:
    """A COCO file with a list of images of one's own."""
    named = layouts.coco(folder, annotations)
    content = json.loads(Path(named["annotations"]).read_bytes())
    Path(named["annotations"]).write_text(json.dumps({**content, "images": images}))
    return named


IMAGES = [{"id": i, "file_name": f"{i:012d}.jpg"} for i in (1, 2)]
PEOPLE: dict[str, tuple[Any, str]] = {
    "nan in the box": (person(5, bbox=[1, 1, float("nan"), 5]), "bbox"),
    "flat box": (person(5, bbox=[1, 1, 0, 5]), "bbox"),
    "box of three": (person(5, bbox=[1, 1, 5]), "bbox"),
    "box of text": (person(5, bbox="1 1 5 5"), "bbox is no list of numbers"),
    "box outside": (person(5, bbox=[100, 100, 5, 5]), "lies outside its image of 16x12"),
    "endless box": (person(5, bbox=[1, 1, 1e300, 5]), "lies outside its image"),
    "too few joints": (person(5, keypoints=[1.0, 2.0, 2]), "holds 3 numbers"),
    "joints of text": (person(5, keypoints=["1"] * 51), "no list of numbers"),
    "no joints": (person(5, keypoints=None), "no list of numbers"),
    "nan in a joint": (person(5, keypoints=[float("nan"), 1.0, 2] * 17), "not finite"),
    "a number beyond floats": (person(5, keypoints=[10**400, 1, 2] * 17), "too large"),
    "joints far outside": (person(5, keypoints=[4.0, 4.0, 2] * 16 + [400.0, 4.0, 2]), "384 pixels outside its image"),
    "nothing visible": (person(5, keypoints=[4.0, 4.0, 0] * 17), "no joint is labelled"),
    "nan for an area": (person(5, area=float("nan")), "area is nan"),
    "no box": ({key: value for key, value in person(5).items() if key != "bbox"}, "lacks 'bbox'"),
    "no id": ({key: value for key, value in person(5).items() if key != "id"}, "has no usable id"),
    "id of a list": (person(5, id=[[]]), "has no usable id"),
    "no image": ({key: value for key, value in person(5).items() if key != "image_id"}, "which `images` lacks"),
    "unknown image": (person(5, image=44), "of image 44, which `images` lacks"),
    "second of an id": (person(1), "two annotations have the id 1"),
    "a text": ("person", "is person, expected an object"),
    "nothing": (None, "is None, expected an object"),
}


@pytest.mark.parametrize("people", ["one", "all"])
@pytest.mark.parametrize("name", PEOPLE)
def test_a_hostile_person_is_set_aside(name: str, people: Any, tmp_path: Path) -> None:
    annotation, reason = PEOPLE[name]
    good = person(1, image=2)
    alone, _ = result(CocoKeypoints(**fields(tmp_path, [good], IMAGES), people=people))
    found, reasons = result(CocoKeypoints(**fields(tmp_path, [good, annotation], IMAGES), people=people))
    assert len(reasons) == 1 and reason in reasons[0] and "\n" not in reasons[0]
    assert_only_good(found, alone)


def test_an_image_with_a_damaged_person_is_not_shown_without_that_person(tmp_path: Path) -> None:
    annotations = [person(1), person(2, keypoints=[1.0]), person(3, image=2)]
    found, reasons = result(CocoKeypoints(**fields(tmp_path, annotations, IMAGES), people="all"))
    assert list(found) == ["000000000002"] and "annotation 2 of 000000000001.jpg" in reasons[0]


def test_unlabelled_joints_may_stand_anywhere(tmp_path: Path) -> None:
    joints = [4.0, 4.0, 2] * 16 + [9000.0, 4.0, 0]
    (sample,) = result(CocoKeypoints(**fields(tmp_path, [person(1, keypoints=joints)], IMAGES)))[0].values()
    assert sample.label.joints[16] == [9000.0, 4.0, 0.0]


TABLES: dict[str, tuple[Any, str]] = {
    "an id of two images": ([*IMAGES, {"id": 1, "file_name": "other.jpg"}], "an id that two images have"),
    "an image of text": ([IMAGES[1], "000000000001.jpg"], "which `images` lacks"),
    "an image without id": ([IMAGES[1], {"file_name": "000000000001.jpg"}], "which `images` lacks"),
    "an image without name": ([IMAGES[1], {"id": 1}], "names image 'None', which is not in"),
    "a name of a list": ([IMAGES[1], {"id": 1, "file_name": ["x"]}], "which is not in"),
    "half a surrogate pair": ([IMAGES[1], {"id": 1, "file_name": "\ud800.jpg"}], "which is not in"),
    "a zero byte in a name": ([IMAGES[1], {"id": 1, "file_name": "000000000001.jpg\0.png"}], "which is not in"),
    "a path in place of a name": ([IMAGES[1], {"id": 1, "file_name": "/etc/passwd"}], "'/etc/passwd', which is not in"),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_hostile_table_of_images_spoils_only_its_own(name: str, tmp_path: Path) -> None:
    images, reason = TABLES[name]
    annotations = [person(1), person(2, image=2)]
    found, reasons = result(CocoKeypoints(**fields(tmp_path, annotations, images)))
    assert list(found) == ["000000000002-2"] and len(reasons) == 1 and reason in reasons[0]
    reasons[0].encode()


def test_a_file_that_names_other_images_than_are_there_is_refused(tmp_path: Path) -> None:
    images = [{"id": i, "file_name": f"elsewhere{i}.jpg"} for i in (1, 2)]
    with pytest.raises(UserError, match=r"holds nothing that can be used.*'elsewhere1.jpg', which is not in"):
        listing(CocoKeypoints(**fields(tmp_path, [person(1), person(2, image=2)], images)))


WHOLE_FILES: dict[str, tuple[bytes, str]] = {
    "broken": (b"{", "is not JSON"),
    "nested deeply": (b"[" * 200_000, "nested too deeply"),
    "a list": (b"[]", "expected COCO"),
    "lists of the wrong type": (b'{"images": {}, "annotations": 3}', "expected COCO"),
    "nobody": (b'{"images": [], "annotations": []}', "holds no"),
    "only damage": (b'{"images": [], "annotations": [1, {}]}', "holds nothing that can be used"),
    "pickle": (pickle.dumps(Bomb(Path("never"))), "is not JSON"),
    "html": (b"<html>404</html>", "is not JSON"),
}


@pytest.mark.parametrize("name", WHOLE_FILES)
@pytest.mark.parametrize("source", [CocoKeypoints, CocoInstances])
def test_an_unusable_annotation_file_is_refused(name: str, source: Any, tmp_path: Path) -> None:
    content, reason = WHOLE_FILES[name]
    named = layouts.coco(tmp_path, [])
    Path(named["annotations"]).write_bytes(content)
    with pytest.raises(UserError, match=reason) as caught:
        listing(source(**named))
    assert named["annotations"] in str(caught.value) and not isinstance(caught.value, BadItem)


def test_an_annotation_file_of_too_many_bytes_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coco, "LARGEST_JSON", 100)
    with pytest.raises(UserError, match="at most 100 are read"):
        listing(CocoKeypoints(**layouts.coco(tmp_path, [person(1)])))


def test_labels_of_an_image_of_another_size_are_not_used(tmp_path: Path) -> None:
    images = [{**IMAGES[0], "height": 16, "width": 12}, {**IMAGES[1], "height": 12, "width": 16}]
    annotations = [instance(1, [SQUARE]), instance(2, [SQUARE], image_id=2)]
    found, reasons = result(CocoInstances(**fields(tmp_path, annotations, images)))
    assert list(found) == ["000000000002"] and "16x12 pixels, its labels are of an image of 12x16" in reasons[0]


@pytest.mark.parametrize("people", ["one", "all"])
def test_keypoints_of_an_image_of_another_size_are_not_used(people: Any, tmp_path: Path) -> None:
    images = [{**IMAGES[0], "height": 24, "width": 32}, {**IMAGES[1], "height": 12, "width": 16}]
    alone, _ = result(CocoKeypoints(**fields(tmp_path, [person(2, image=2)], images), people=people))
    found, reasons = result(CocoKeypoints(**fields(tmp_path, [person(1), person(2, image=2)], images), people=people))
    assert len(reasons) == 1 and "000000000001.jpg: 16x12 pixels, its labels are of an image of 32x24" in reasons[0]
    assert_only_good(found, alone)


# LMDBs


def lmdb_pair(folder: Path, count: int = 40) -> PairLmdb:
    for name, offset in (("input", 0), ("target", 100)):
        make_lmdb(folder / name, {f"{i:04d}": encoded(picture(i + offset, 60, 80)) for i in range(count)})
    return PairLmdb(degraded=str(folder / "input"), clean=str(folder / "target"))


@pytest.mark.parametrize("part", [0, 0.001, 0.3, 0.999])
def test_a_truncated_lmdb_is_refused_and_ends_no_process(part: float, tmp_path: Path) -> None:
    source = lmdb_pair(tmp_path)
    path = tmp_path / "input" / "data.mdb"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(UserError, match=r"train\.degraded: .*input/data\.mdb: .* damaged or no LMDB"):
        listing(source)


def test_the_lmdb_library_would_have_ended_this_process(tmp_path: Path) -> None:
    """Why the pages are read by ourselves."""
    lmdb_pair(tmp_path)
    path = tmp_path / "input" / "data.mdb"
    path.write_bytes(path.read_bytes()[:100_000])
    code = f"import lmdb\nfor _ in lmdb.open({str(path.parent)!r}, readonly=True, lock=False).begin().cursor(): pass"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode < 0


@pytest.mark.parametrize("seed", range(8))
def test_a_damaged_lmdb_is_refused_or_read_and_never_crashes(seed: int, tmp_path: Path) -> None:
    source = lmdb_pair(tmp_path, 200)
    path, rng = tmp_path / "input" / "data.mdb", np.random.default_rng(seed)
    content = bytearray(path.read_bytes())
    pages = rng.integers(0, len(content) // 4096, 40)
    for page in [0, 1, *pages][:: 1 + seed % 2]:
        content[page * 4096 + int(rng.integers(0, 200))] = int(rng.integers(0, 256))
    path.write_bytes(content)
    try:
        found, reasons = result(source)
    except UserError as error:
        assert "input/data.mdb" in str(error)
    else:
        assert len(found) + len(reasons) == 200


def test_missing_keys_values_that_are_no_images_and_of_another_size_are_set_aside(tmp_path: Path) -> None:
    clean = {f"{i:04d}": encoded(picture(i)) for i in range(6)}
    make_lmdb(tmp_path / "a", clean)
    alone, _ = result(PairLmdb(degraded=str(tmp_path / "a"), clean=str(tmp_path / "a")))
    degraded = clean | {"0001": pickle.dumps(Bomb(tmp_path / "never")), "0002": encoded(picture(2, 5, 5)), "0003": b""}
    del degraded["0004"]
    make_lmdb(tmp_path / "b", degraded)
    found, reasons = result(PairLmdb(degraded=str(tmp_path / "b"), clean=str(tmp_path / "a")))
    assert_only_good(found, {name: alone[name] for name in ("0000", "0005")})
    assert [reason.partition("b/data.mdb: ")[2] for reason in reasons] == [
        "has no key 0004",
        "0001: cannot be read as an image: cannot identify image file",
        "0002: 5x5 pixels, its clean image 16x12",
        "0003: cannot be read as an image: empty file",
    ]
    assert not (tmp_path / "never").exists()


def test_a_meta_info_that_lies_is_no_more_than_names(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_lmdb(tmp_path / name, {"0001": encoded(picture(1))})
    (tmp_path / "a" / "meta_info.txt").write_bytes(b"0001.png (12,16,3) 1\n/etc/passwd (1,1,3) 1\n\xff\xfe.png\n\n0001.png\n")
    found, reasons = result(PairLmdb(degraded=str(tmp_path / "a"), clean=str(tmp_path / "b")))
    assert list(found) == ["0001"] and len(reasons) == 2
    assert "has no key /etc/passwd" in reasons[0] and "not UTF-8" in reasons[1]


def test_an_image_that_its_file_system_refuses_is_set_aside() -> None:
    for read in (read_image, read_mask):
        with pytest.raises(BadItem, match=r"^nowhere://bucket/a\.png: cannot open: "):
            read("nowhere://bucket/a.png")
