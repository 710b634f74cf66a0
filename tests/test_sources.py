"""Every source reads the layout in which its data set is published: pixels and labels are those that were put in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

import lmdb
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from lvm_ray.errors import BadItem, UserError
from lvm_ray.sources import Source
from lvm_ray.sources.coco import CocoInstances, CocoKeypoints
from lvm_ray.sources.files import decode_image, read_mask
from lvm_ray.sources.folders import BlurFolders, ImageFolder, MaskFolders, PictureFolders, RainFolders
from lvm_ray.sources.lmdb_pairs import PairLmdb, list_values
from lvm_ray.sources.rle import read_rle
from lvm_ray.sources.sa1b import Sa1bTars
from lvm_ray.sources.tar import list_members, read_member
from lvm_ray.sources.video import VideoFrames
from lvm_ray.sources.webdataset import WebdatasetTars
from tests.layouts import (
    coco,
    encoded,
    good_sa1b_pair,
    listing,
    loaded,
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


def test_sa1b_tars_give_photos_with_their_masks_largest_first(tmp_path: Path) -> None:
    masks = [mask_of(12, 16, (1, 2, 3, 4)), mask_of(12, 16, (0, 0, 16, 9)), mask_of(12, 16, (15, 11, 1, 1))]
    make_tar(tmp_path / "sa_000010.tar", good_sa1b_pair(30))
    make_tar(tmp_path / "sa_000009.tar", [member(".", type=b"5"), *sa1b_pair(8, masks), *good_sa1b_pair(12)])
    source = Sa1bTars(tars=str(tmp_path))
    items, problems = listing(source)
    assert [item.id for item in items] == ["sa_000009/sa_12", "sa_000009/sa_8", "sa_000010/sa_30"]
    assert [item.original for item in items] == ["sa_12", "sa_8", "sa_30"] and not problems
    sample = source.load(items[1])
    assert np.array_equal(sample.image, decode_image(encoded(picture(8), "JPEG", quality=95), "sa_8.jpg"))
    assert [region.area for region in sample.label] == [144, 12, 1]
    assert [region.category for region in sample.label] == [None] * 3
    for region, mask in zip(sample.label, [masks[1], masks[0], masks[2]], strict=True):
        assert np.array_equal(coco_mask.decode(region.rle), mask)


def test_tars_are_named_as_one_file_a_folder_or_a_pattern_and_as_a_uri(tmp_path: Path) -> None:
    for number in (1, 2, 13):
        make_tar(tmp_path / f"sa_{number:06d}.tar", good_sa1b_pair(number))

    def ids(place: str) -> list[str]:
        return [item.original for item in listing(Sa1bTars(tars=place))[0]]

    assert ids(f"{tmp_path}/sa_000002.tar") == ["sa_2"]
    assert ids(f"{tmp_path}/sa_00001*.tar") == ["sa_13"]
    assert ids(f"file://{tmp_path}") == ["sa_1", "sa_2", "sa_13"]
    assert len(loaded(Sa1bTars(tars=f"file://{tmp_path}"))) == 3


@pytest.mark.parametrize("layout", ["folder", "pattern", "tars", "tar pattern", "lmdb", "frames", "coco"])
def test_a_uri_with_a_query_and_odd_names_gives_what_its_path_gives(tmp_path: Path, layout: str) -> None:
    odd = "a b#c%20?d"
    place = tmp_path / odd

    def sources(folder: str, query: str) -> Source:
        match layout:
            case "folder":
                return ImageFolder(images=f"{folder}/x{query}")
            case "pattern":
                return RainFolders(clean=f"{folder}/clips/*/sharp{query}", rainy=f"{folder}/clips/*/blur{query}")
            case "tars":
                return Sa1bTars(tars=f"{folder}/{query}")
            case "tar pattern":
                return WebdatasetTars(tars=f"{folder}/sa *.tar{query}" if not query else f"{folder}/sa%20*.tar{query}")
            case "lmdb":
                return PairLmdb(degraded=f"{folder}/a{query}", clean=f"{folder}/b{query}")
            case "frames":
                return VideoFrames(clips=f"{folder}/clips{query}", length=2)
            case _:
                return CocoKeypoints(images=f"{folder}/images{query}", annotations=f"{folder}/annotations.json{query}")

    coco(place, [person(1)])
    (place / "images/000000000001.jpg").rename(place / f"images/{odd}.jpg")
    listing_file = place / "annotations.json"
    listing_file.write_text(listing_file.read_text().replace("000000000001.jpg", f"{odd}.jpg"))
    for number in (1, 2):
        write(place / "x" / f"{number} {odd}.png", encoded(picture(number)))
        make_tar(place / f"sa {number}#%41.tar", good_sa1b_pair(number))
        for kind in ("sharp", "blur"):
            write(place / "clips" / odd / kind / f"{number}#.png", encoded(picture(number)))
        write(place / "clips" / odd / f"{number}?.png", encoded(picture(number)))
        make_lmdb(place / "ab"[number - 1], {odd: encoded(picture(number))})
    by_path = loaded(sources(str(place), ""))
    by_uri = loaded(sources(f"file://{quote(str(place))}", "?region=us-east-1&endpoint_override=http://minio:9000/x.y"))
    assert by_path and by_uri.keys() == by_path.keys() and all(same(by_uri[name], by_path[name]) for name in by_path)


@pytest.mark.parametrize("format", [0, 1, 2])
def test_members_lie_where_the_listing_says_long_names_included(tmp_path: Path, format: int) -> None:
    names = ["a.jpg", "f" * 60 + "/" + "b" * 90 + ".jpg", "ü.jpg"] + (["x" * 300 + ".jpg"] if format else [])
    contents = {name: name.encode() * i for i, name in enumerate(names, 1)}
    tar = make_tar(tmp_path / "t.tar", [member(name, content) for name, content in contents.items()], format)
    found = {m.name: read_member(str(tar), [m.offset, m.size], m.name) for m in list_members(str(tar)) if m.problem is None}
    assert found == contents


def test_laion_tars_give_images_without_labels(tmp_path: Path) -> None:
    for tar, first in (("00000", 0), ("00001", 10000)):
        members = []
        for i in range(first, first + 2):
            name = f"{i:09d}"
            members += [
                member(f"{name}.jpg", encoded(picture(i), "JPEG")),
                member(f"{name}.txt", b"a caption"),
                member(f"{name}.json", json.dumps({"url": "https://example.org", "key": name}).encode()),
            ]
        make_tar(tmp_path / f"{tar}.tar", members)
    (tmp_path / "00000.parquet").touch()
    samples = loaded(WebdatasetTars(tars=str(tmp_path)))
    assert list(samples) == ["00000/000000000", "00000/000000001", "00001/000010000", "00001/000010001"]
    assert samples["00001/000010000"].label is None
    assert np.array_equal(samples["00001/000010000"].image, decode_image(encoded(picture(10000), "JPEG"), "x"))


def test_a_webdataset_key_ends_at_the_first_dot_and_its_last_ending_says_what_it_is(tmp_path: Path) -> None:
    names = ["0001.jpg", "0001.json", "0002.v2.jpg", "0003.txt", "a.b/0004.seg.PNG", "0002.jpg"]
    make_tar(tmp_path / "t.tar", [member(name, encoded(picture(i))) for i, name in enumerate(names)])
    items, problems = listing(WebdatasetTars(tars=str(tmp_path)))
    assert [item.id for item in items] == ["t/0001", "t/0002", "t/a.b/0004"]
    assert len(problems) == 1 and "t.tar: 0002.jpg is a second image of t/0002: the first is used" in problems[0]
    assert np.array_equal(loaded(WebdatasetTars(tars=str(tmp_path)))["t/0002"].image, picture(2))


def test_rain13k_lmdb_pairs_are_read_by_key(tmp_path: Path) -> None:
    names = [f"{i:04d}" for i in (3, 1, 2)]
    make_lmdb(tmp_path / "input.lmdb", {name: encoded(picture(int(name))) for name in names})
    make_lmdb(tmp_path / "target.lmdb", {name: encoded(picture(100 + int(name))) for name in names})
    samples = loaded(PairLmdb(degraded=str(tmp_path / "input.lmdb"), clean=str(tmp_path / "target.lmdb")))
    assert list(samples) == ["0001", "0002", "0003"]
    for name, sample in samples.items():
        assert np.array_equal(sample.image, picture(int(name))) and np.array_equal(sample.label, picture(100 + int(name)))


def test_without_meta_info_the_keys_are_the_names_and_a_uri_is_read(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        make_lmdb(tmp_path / folder, {"x/1": encoded(picture(1)), "x/2": encoded(picture(2))}, meta=False)
    assert list(loaded(PairLmdb(degraded=f"file://{tmp_path}/a", clean=f"file://{tmp_path}/b"))) == ["x/1", "x/2"]


def test_an_lmdb_is_listed_as_the_lmdb_library_reads_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = {f"{i:05d}": rng.bytes(int(rng.integers(0, 6000))) for i in range(1500)}
    folder = make_lmdb(tmp_path / "many", values, meta=False)
    with lmdb.open(str(folder), map_size=1 << 24) as environment, environment.begin(write=True) as transaction:
        for name in list(values)[::3]:
            transaction.delete(name.encode())
    content = (folder / "data.mdb").read_bytes()
    listed = {name: content[start : start + size] for name, (start, size) in list_values(f"{folder}/data.mdb", "x").items()}
    with lmdb.open(str(folder), readonly=True, lock=False) as environment, environment.begin() as transaction:
        assert listed == {key.decode(): value for key, value in transaction.cursor()}
    assert len(listed) == 1000


def test_coco_keypoints_are_one_item_a_person_or_an_image(tmp_path: Path) -> None:
    people = [person(7), person(9, shift=3.0), person(5, image=2), person(6, num_keypoints=0), person(8, iscrowd=1)]
    fields = coco(tmp_path, people)
    samples = loaded(CocoKeypoints(**fields))
    assert list(samples) == ["000000000001-7", "000000000001-9", "000000000002-5"]
    label = samples["000000000001-9"].label
    assert label.joints[0] == [6.0, 2.0, 2.0] and label.box == [5.0, 1.0, 6.0, 8.0] and label.area == 49 and label.others == []
    assert np.array_equal(samples["000000000002-5"].image, decode_image(encoded(picture(2), "JPEG"), "x"))
    everyone = loaded(CocoKeypoints(**fields, people="all"))
    assert list(everyone) == ["000000000001", "000000000002"]
    assert everyone["000000000001"].label == label.model_copy(update={"others": [samples["000000000001-7"].label]})
    assert everyone["000000000002"].label == samples["000000000002-5"].label


def region(number: int, segmentation: Any, image: int = 1, category: int = 18, **changes: Any) -> dict[str, Any]:
    return {"id": number, "image_id": image, "category_id": category, "iscrowd": 0, "segmentation": segmentation, **changes}


def test_coco_instances_are_regions_with_their_categories(tmp_path: Path) -> None:
    square, other = [2, 3, 8, 3, 8, 7, 2, 7], [10, 1, 14, 1, 14, 4, 10, 4]
    mask = mask_of(12, 16, (0, 5, 9, 6))
    counts = [5, *[6] * 17]  # columns of 12: five rows of 0, six of 1, one of 0
    uncompressed = {"size": [12, 16], "counts": [*counts, 12 * 16 - sum(counts)]}
    annotations = [
        region(1, [square, other]),
        region(2, rle_of(mask), category=1),
        region(3, [square], image=2),
        region(4, uncompressed, image=2),
        region(5, {"size": [12, 16], "counts": [0, 192]}, iscrowd=1),
    ]
    source = CocoInstances(**coco(tmp_path, annotations, images=3))
    samples = loaded(source)
    assert list(samples) == ["000000000001", "000000000002"]  # the third has no objects
    first, second = (sample.label for sample in samples.values())
    assert [(found.category, found.area) for found in first] == [("person", 54), ("dog", 24 + 12)]
    assert np.array_equal(coco_mask.decode(first[1].rle), mask_of(12, 16, (2, 3, 6, 4)) | mask_of(12, 16, (10, 1, 4, 3)))
    assert np.array_equal(coco_mask.decode(second[0].rle), mask)


@pytest.mark.parametrize("seed", range(6))
def test_run_length_codes_are_checked_as_pycocotools_reads_them(seed: int) -> None:
    rng = np.random.default_rng(seed)
    height, width = (int(side) for side in rng.integers(1, 150, 2))
    mask = (rng.random((height, width)) < rng.random()).astype(np.uint8)
    code = rle_of(mask)
    checked, area = read_rle(code, height, width)
    assert checked["counts"] == code["counts"].encode() and area == mask.sum()


def test_voc_palette_masks_binary_masks_and_masks_in_colours_are_ids(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).choice([0, 1, 15, 255], (12, 16)).astype(np.uint8)
    indexed = Image.fromarray(ids, mode="P")
    indexed.putpalette(np.random.default_rng(1).integers(0, 256, 768).astype(np.uint8).tobytes())
    colours = [[0, 0, 0], [128, 64, 128], [70, 70, 70]]
    in_colours = np.array([*colours, [1, 2, 3]], np.uint8)[ids % 4]
    for name in ("voc", "binary", "coloured"):
        write(tmp_path / name / "JPEGImages" / "2007_000032.jpg", encoded(picture(0), "JPEG"))
        (tmp_path / name / "SegmentationClass").mkdir()
    indexed.save(tmp_path / "voc" / "SegmentationClass" / "2007_000032.png")
    write(tmp_path / "binary" / "SegmentationClass" / "2007_000032.png", encoded(np.where(ids == 1, 255, 0).astype(np.uint8)))
    write(tmp_path / "coloured" / "SegmentationClass" / "2007_000032.png", encoded(in_colours))

    def mask(name: str, **settings: Any) -> np.ndarray:
        folders = {"images": str(tmp_path / name / "JPEGImages"), "masks": str(tmp_path / name / "SegmentationClass")}
        (sample,) = loaded(MaskFolders(**folders, **settings)).values()
        return sample.label

    assert np.array_equal(mask("voc"), ids)
    assert np.array_equal(mask("binary", binary=True), ids == 1)
    assert np.array_equal(mask("coloured", colours=colours), np.array([0, 1, 2, 255])[ids % 4])


def test_gopro_scenes_are_pairs_of_two_patterns_and_a_scene_is_one_original(tmp_path: Path) -> None:
    for scene in ("GOPR0372_07_00", "GOPR0374_11_00"):
        for i, kind in enumerate(("blur", "blur_gamma", "sharp")):
            for frame in (47, 48):
                write(tmp_path / "train" / scene / kind / f"{frame:06d}.png", encoded(picture(frame + 100 * i)))
    source = BlurFolders(blurred=f"{tmp_path}/train/*/blur", clean=f"{tmp_path}/train/*/sharp")
    items, problems = listing(source)
    assert [item.id for item in items] == [
        f"{scene}/{frame}" for scene in ("GOPR0372_07_00", "GOPR0374_11_00") for frame in ("000047", "000048")
    ]
    assert items[0].original == items[1].original == "GOPR0372_07_00" and not problems
    sample = source.load(items[3])
    assert np.array_equal(sample.image, picture(48)) and np.array_equal(sample.label, picture(248))


def test_hd_vila_clips_are_items_of_frames_in_their_order(tmp_path: Path) -> None:
    for clip, frames in (("abc.0", 11), ("abc.10", 4), ("abc.9", 3)):
        for i in range(frames):
            write(tmp_path / clip / f"frame{i}.jpg", encoded(picture(i), "JPEG"))
    source = VideoFrames(clips=str(tmp_path), length=4)
    items, problems = listing(source)
    assert [(item.id, item.original) for item in items] == [
        ("abc.0/000000", "abc.0"),
        ("abc.0/000004", "abc.0"),
        ("abc.10/000000", "abc.10"),
    ]
    assert len(problems) == 1 and "abc.9: 3 frames, an item takes 4" in problems[0]
    sample = source.load(items[1])
    wanted = [decode_image(encoded(picture(i), "JPEG"), "x") for i in (4, 5, 6, 7)]
    assert all(np.array_equal(frame, other) for frame, other in zip(sample.label, wanted, strict=True))
    assert np.array_equal(sample.image, wanted[0])
    apart = VideoFrames(clips=str(tmp_path), length=3, stride=2)
    paths = [[Path(path).stem for path in item.paths] for item in listing(apart)[0] if item.original == "abc.0"]
    assert paths == [["frame0", "frame2", "frame4"], ["frame6", "frame8", "frame10"]]


def test_frames_of_another_size_and_folders_without_clips_are_named(tmp_path: Path) -> None:
    for i in range(4):
        write(tmp_path / "clips" / "a" / f"{i}.png", encoded(picture(i, 12, 16 + i // 3)))
    source = VideoFrames(clips=str(tmp_path / "clips"), length=4)
    with pytest.raises(BadItem, match=r"3\.png: 17x12 pixels, the first frame 16x12"):
        source.load(listing(source)[0][0])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no folder matches"):
        listing(VideoFrames(clips=str(tmp_path / "empty")))


def test_a_pattern_of_folders_of_images_counts_each_folder_as_one_original(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write(tmp_path / folder / "1.png", encoded(picture(1)))
    items, _ = listing(ImageFolder(images=f"{tmp_path}/*"))
    assert [(item.id, item.original) for item in items] == [("a/1", "a"), ("b/1", "b")]


def test_listings_are_the_same_every_time_and_hold_plain_values(tmp_path: Path) -> None:
    make_tar(tmp_path / "t.tar", good_sa1b_pair(1) + good_sa1b_pair(2))
    fields = coco(tmp_path / "coco", [person(1), person(2, image=2)])
    for source in (Sa1bTars(tars=str(tmp_path)), CocoKeypoints(**fields), CocoKeypoints(**fields, people="all")):
        items = listing(source)[0]
        assert items == listing(source)[0]
        assert all(json.loads(json.dumps(item.extra)) == item.extra for item in items)


def test_binary_masks_are_read_by_their_own_two_values(tmp_path: Path) -> None:
    truth = np.random.default_rng(0).integers(0, 2, (12, 16)).astype(np.uint8)
    shades = np.where(truth, np.random.default_rng(1).integers(200, 256, truth.shape), 30).astype(np.uint8)
    grey = {"ones": truth, "white": truth * 255, "rgb": np.stack([truth * 255] * 3, -1), "shades": shades}
    for name, pixels in grey.items():
        assert np.array_equal(read_mask(str(write(tmp_path / f"{name}.png", encoded(pixels))), binary=True), truth), name
    indexed = Image.fromarray(truth, mode="P")
    indexed.putpalette([255, 255, 255, 9, 9, 9])
    indexed.save(tmp_path / "indexed.png")
    assert np.array_equal(read_mask(str(tmp_path / "indexed.png"), binary=True), truth)


def test_a_mask_without_any_of_its_colours_is_named(tmp_path: Path) -> None:
    path = str(write(tmp_path / "mask.png", encoded(np.full((4, 4, 3), 7, np.uint8))))
    with pytest.raises(BadItem, match=r"none of `colours` is in it; its most frequent colour is \[7, 7, 7\]"):
        read_mask(path, [[0, 0, 0], [1, 2, 3]])


def test_the_scale_of_deep_labels_is_the_recipes_and_never_a_files(tmp_path: Path) -> None:
    depth = np.array([[0, 2500], [5000, 9000]], np.uint16)
    write(tmp_path / "images" / "a.png", encoded(np.zeros((2, 2, 3), np.uint8)))
    (tmp_path / "labels").mkdir()
    Image.fromarray(depth).save(tmp_path / "labels" / "a.png")
    folders = {"images": str(tmp_path / "images"), "labels": str(tmp_path / "labels")}
    (sample,) = loaded(PictureFolders(**folders, white=5000.0)).values()
    assert sample.label[..., 0].tolist() == [[0, 128], [255, 255]]
    Image.fromarray((depth / 5000).astype(np.float32)).save(tmp_path / "labels" / "a.tiff")
    (tmp_path / "labels" / "a.png").unlink()
    source = PictureFolders(**folders)
    with pytest.raises(BadItem, match=r"values from 0 to 1.8, of which 0 to 1 can be shown: set `white`"):
        source.load(next(source.items("x")))


def test_keypoints_of_an_image_of_another_size_are_refused(tmp_path: Path) -> None:
    source = CocoKeypoints(**coco(tmp_path, [person(1)]))
    write(tmp_path / "images" / "000000000001.jpg", encoded(picture(1, 24, 32), "JPEG"))
    with pytest.raises(BadItem, match="32x24 pixels, its labels are of an image of 16x12"):
        source.load(next(source.items("x")))
    with pytest.raises(UserError, match=r"names its images by file name alone: give one folder, without `\*`"):
        next(CocoKeypoints(images=f"{tmp_path}/*/images", annotations=source.annotations).items("x"))


def test_two_images_of_one_name_clash_only_where_there_are_pairs(tmp_path: Path) -> None:
    for name in ("a.png", "a.bmp", "b.png"):
        write(tmp_path / "images" / name, encoded(picture(1), name[2:].upper()))
    items, problems = listing(ImageFolder(images=str(tmp_path / "images")))
    assert [(item.id, item.original) for item in items] == [("a.bmp", "a"), ("a.png", "a"), ("b", "b")] and not problems
    with pytest.raises(UserError, match="have the same name; pairs are made by name"):
        listing(PictureFolders(images=str(tmp_path / "images"), labels=str(tmp_path / "images")))


def test_a_webdataset_name_ends_at_its_first_dot_and_its_last_ending_says_what_it_is(tmp_path: Path) -> None:
    members = [member("0001.jpg", encoded(picture(1), "JPEG")), member("0002.v2.jpg", encoded(picture(2), "JPEG"))]
    items, problems = listing(WebdatasetTars(tars=str(make_tar(tmp_path / "0.tar", [*members, member("0003.json", b"{}")]))))
    assert [item.id for item in items] == ["0/0001", "0/0002"] and not problems
