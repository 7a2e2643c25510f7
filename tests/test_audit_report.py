"""The audit as a whole: what is found, what is said of it, and the page that shows it."""

import csv
import json
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules import DataError
from datamodules.audit import as_html, as_json, audit, findings, inspect, write_report
from datamodules.audit import report as reporting
from tests.audit_data import encoded, scene, table_in_memory, table_of_files
from tests.test_architecture import modules, reaches

HOSTILE = '<script>alert("1")<img src=x onerror=alert(2)>&amp;'


class Page(HTMLParser):
    """What a browser would see."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.addresses: list[str] = []
        self.events: list[str] = []
        self.ids: set[str] = set()
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        for name, value in attrs:
            if name in ("src", "href"):
                self.addresses.append(value or "")
            if name == "id":
                self.ids.add(value or "")
            if name.startswith("on"):
                self.events.append(name)

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def clean_table(**more):
    images = [encoded(scene(number)) for number in range(48)]
    labels = ["cat", "dog"] * 24
    splits = ["train"] * 24 + ["val"] * 12 + ["test"] * 12
    return table_in_memory(images, labels, splits, **more)


def faulty_table(root: Path):
    """Files with every fault, and what they are called."""
    paths, splits = [], []

    def add(path: str, content: bytes, split: str = "train") -> None:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
        paths.append(path)
        splits.append(split)

    for number in range(36):
        add(
            f"{'cat' if number % 2 else 'dog'}/{number}.png",
            encoded(scene(number)),
            ("train", "train", "val")[number % 3],
        )
    add("cat/copy of 1.png", encoded(scene(1)), "test")
    add("dog/smaller 4.jpg", encoded(scene(4).resize((80, 60)), "JPEG"), "test")
    add("cat/said to be another.png", encoded(scene(6)), "train")
    add("cat/twice.png", encoded(scene(7)), "train")
    add("dog/empty.png", b"", "test")
    add("cat/short.jpg", encoded(scene(90), "JPEG")[:1000])
    add("cat/png inside.jpg", encoded(scene(91)))
    add("dog/moves.gif", encoded(scene(92), "GIF", save_all=True, append_images=[scene(93)]))
    add("dog/blank.png", encoded(Image.new("RGB", (30, 30), (250, 250, 250))))
    broken = np.asarray(scene(94)).copy()
    broken[60:] = 128
    add("dog/half.png", encoded(Image.fromarray(broken)))
    add(f"cat/{HOSTILE}.png", encoded(scene(95)))
    add("cat/\N{RIGHT-TO-LEFT OVERRIDE}gnp.png", encoded(scene(96)))
    return table_of_files(root, paths, splits)


def keys_of(found):
    return [finding.key for finding in findings(found)]


def test_nothing_wrong_is_said_to_be_so():
    table = clean_table()
    features = np.random.default_rng(0).normal(size=(48, 4)).astype(np.float32)
    features += 6 * np.array([[label == "cat"] for label in table.labels])
    found = audit(table, features=features)
    assert found.passed
    assert findings(found) == []
    page = Page(as_html(found))
    assert "Nothing wrong was found." in page.text
    assert "No picture is there twice" in page.text
    assert "Every image can be read" in page.text
    assert page.tags["img"] == 0


def test_every_fault_is_found_and_the_gravest_comes_first(tmp_path):
    found = audit(faulty_table(tmp_path))
    assert not found.passed
    paths = found.table.paths

    def names(rows):
        return sorted(paths[row] for row in rows)

    assert names(found.unreadable) == ["cat/short.jpg", "dog/empty.png"]
    assert names(found.misnamed) == ["cat/png inside.jpg"]
    assert names(found.animated) == ["dog/moves.gif"]
    assert names(found.flat) == ["dog/blank.png"]
    assert names(found.damaged) == ["dog/half.png"]
    assert [names(leak.rows) for leak in found.leaks] == [
        ["cat/1.png", "cat/copy of 1.png"],
        ["dog/4.png", "dog/smaller 4.jpg"],
    ]
    assert [names(conflict.rows) for conflict in found.conflicts] == [["cat/said to be another.png", "dog/6.png"]]
    assert keys_of(found) == [
        "unreadable",
        "leaks",
        "conflicts",
        "duplicates",
        "damaged",
        "flat",
        "misnamed",
        "animated",
        "labels-unjudged",
    ]
    levels = [finding.level for finding in findings(found)]
    assert levels == sorted(levels, key=("problem", "warning", "note").index)
    leak = findings(found)[1]
    assert leak.count == 2
    assert "1 as identical copies, 1 as near ones" in leak.detail
    assert "2 of 3 test images (66.7%) have a copy, or nearly one, in training" in leak.detail


def test_copies_in_validation_and_test_alone_are_no_copies_of_training_images():
    contents = clean_table().listing.storage.encoded
    splits = ["train"] * 30 + ["val"] * 10 + ["test"] * 8
    found = audit(table_in_memory([*contents[:-1], contents[35]], ["cat"] * 48, splits))
    assert found.leaks[0].splits == ("val", "test")
    assert "in training" not in findings(found)[0].detail


def test_the_page_needs_nothing_and_runs_nothing(tmp_path):
    found = audit(faulty_table(tmp_path), augmented=[(np.asarray(scene(0)), [np.asarray(scene(1))] * 3)])
    text = as_html(found)
    page = Page(text)
    assert page.tags["script"] == 0
    assert page.events == []
    assert page.tags["link"] == page.tags["iframe"] == 0
    assert all(address.startswith(("data:image/jpeg;base64,", "#")) for address in page.addresses)
    assert {address[1:] for address in page.addresses if address.startswith("#")} <= page.ids
    assert "http://" not in text
    assert "https://" not in text
    assert "url(" not in text
    assert "default-src 'none'" in text
    for path in ("dog/empty.png", "cat/short.jpg", "cat/png inside.jpg", "dog/smaller 4.jpg"):
        assert path in page.text
    assert "it is empty" in page.text
    assert page.tags["img"] == 4 * 2 + 4


def test_hostile_names_are_shown_and_never_interpreted():
    names = [f"{HOSTILE}{row}.png" for row in range(47)] + ["\udcff.png"]
    table = clean_table(names=names)
    contents = [*table.listing.storage.encoded[:46], table.listing.storage.encoded[0], b""]
    table = table_in_memory(contents, [HOSTILE, "\udcfe"] * 24, ["train"] * 30 + ["test"] * 18, names)
    features = np.random.default_rng(0).normal(size=(48, 4)).astype(np.float32)
    page = Page(as_html(audit(table, features=features)))
    assert page.tags["script"] == 0
    assert page.events == []
    assert f"{HOSTILE}46.png" in page.text
    assert "\\udcff.png" in page.text
    json.loads(json.dumps(as_json(audit(table))))


def test_json_has_everything_in_plain_types(tmp_path):
    found = audit(faulty_table(tmp_path))
    data = json.loads(json.dumps(as_json(found), allow_nan=False))
    assert set(data) == {
        "version",
        "location",
        "images",
        "passed",
        "findings",
        "counts",
        "files",
        "unreadable",
        "misnamed",
        "animated",
        "damaged",
        "flat",
        "duplicates",
        "families",
        "crossing_groups",
        "group_suggestions",
        "labels_judged",
        "suspects",
        "shortcut",
        "drift",
    }
    assert data["images"] == 48
    assert data["passed"] is False
    assert data["counts"]["cat"] == {"train": 18, "val": 6, "test": 1}
    assert data["unreadable"] == [
        {"path": "dog/empty.png", "label": "dog", "split": "test", "problem": "it is empty"},
        {
            "path": "cat/short.jpg",
            "label": "cat",
            "split": "train",
            "problem": "image file is truncated (29 bytes not processed)",
        },
    ]
    assert data["misnamed"] == [{"path": "cat/png inside.jpg", "format": "PNG"}]
    assert data["animated"] == [{"path": "dog/moves.gif", "frames": 2}]
    assert data["damaged"] == [{"path": "dog/half.png", "missing": 0.5}]
    assert data["flat"] == ["dog/blank.png"]
    assert data["files"]["formats"] == {"PNG": 44, "JPEG": 1, "GIF": 1}
    assert data["files"]["sizes"] == {"160x120": 44, "80x60": 1, "30x30": 1}
    first = data["duplicates"][0]
    assert (first["kind"], first["leaks"], first["conflict"], first["similarity"]) == (
        "identical file",
        True,
        False,
        1.0,
    )
    assert first["images"][1] == {"path": "cat/copy of 1.png", "label": "cat", "split": "test"}
    assert first["pairs"][0] == {
        "first": "cat/1.png", "second": "cat/copy of 1.png", "kind": "identical file", "similarity": 1.0, "turned": "",
    }  # fmt: skip


def test_suspected_labels_are_shown_with_both_classes():
    table = clean_table()
    labels = np.array(table.labels)
    features = np.random.default_rng(0).normal(size=(48, 4)).astype(np.float32) + 6 * (labels == "cat")[:, None]
    features[5] = -2  # as dogs are, and more so
    table.listing.labels[5] = "cat"
    features[2] = np.nan  # no features: left out
    found = audit(table, features=features)
    assert found.judgement is not None
    assert [suspect.row for suspect in found.judgement.suspects] == [5]
    assert np.isnan(found.judgement.scores[2])
    (finding,) = (finding for finding in findings(found) if finding.key == "labels")
    assert finding.count == 1
    assert "cat → dog" in Page(as_html(found)).text
    assert as_json(found)["suspects"][0]["suggested"] == ["dog"]


def test_copies_and_given_groups_are_judged_together_and_kept_together():
    table = clean_table()
    contents = [*table.listing.storage.encoded[:-1], table.listing.storage.encoded[2]]
    groups = [str(row // 2) for row in range(48)]
    found = audit(table_in_memory(contents, table.labels, table.splits, groups=groups))
    together = found.groups()
    assert together[0] == together[1] == "0.png"
    # Row 47 is a copy of row 2, and by their groups rows 3 and 46 come along.
    assert {row for row in range(48) if together[row] == "2.png"} == {2, 3, 46, 47}
    assert len(set(together)) == 23
    alone = audit(table_in_memory(contents, table.labels, table.splits, groups=[""] * 48))
    assert len(set(alone.groups())) == 47
    assert alone.crossing == {}


def test_given_groups_in_several_splits_are_a_problem():
    groups = [f"plant {row // 4}" for row in range(48)]
    splits = ["train"] * 22 + ["val"] * 12 + ["test"] * 14
    table = table_in_memory(clean_table().listing.storage.encoded, ["cat", "dog"] * 24, splits, groups=groups)
    found = audit(table)
    assert found.crossing == {"plant 5": {"train": 2, "val": 2}, "plant 8": {"val": 2, "test": 2}}
    assert not found.passed
    assert "groups" in keys_of(found)
    page = Page(as_html(found))
    assert "plant 5" in page.text
    assert "plant 6" not in page.text
    assert as_json(found)["crossing_groups"][0] == {"group": "plant 5", "splits": {"train": 2, "val": 2}}


def test_group_names_are_suggested_with_a_setting():
    names = [f"{'cat' if row % 2 else 'dog'}/plant{row // 6}_{row}.png" for row in range(48)]
    light = [Image.new("RGB", (160, 120), (30 * plant, 250 - 30 * plant, 128)) for plant in range(8)]
    images = [encoded(Image.blend(scene(row), light[row // 6], 0.5)) for row in range(48)]
    found = audit(table_in_memory(images, ["cat", "dog"] * 24, ["train"] * 24 + ["val"] * 12 + ["test"] * 12, names))
    assert found.passed
    assert audit(clean_table(names=names)).suggestions == []  # these are not alike in any way
    (finding,) = (finding for finding in findings(found) if finding.key == "group-names")
    assert finding.setting == f"data.group_pattern: '{found.suggestions[0].pattern}'"
    assert "plant0" in Page(as_html(found)).text


def test_files_that_tell_class_or_split():
    images = [encoded(scene(row).resize((160, 120) if row % 2 else (120, 120))) for row in range(48)]
    found = audit(table_in_memory(images, ["cat", "dog"] * 24, ["train"] * 24 + ["test"] * 24))
    assert found.shortcut is not None
    assert "shortcut" in keys_of(found)
    drawn = table_in_memory(images, ["a"] * 24 + ["b"] * 24, ["train", "test"] * 24)
    assert audit(drawn).drift is None  # splits that are drawn here do not come from elsewhere
    found = audit(replace(drawn, split_is_ours=False))
    assert found.shortcut is None
    assert found.drift is not None
    assert "drift" in keys_of(found)


def test_classes_that_are_rare_missing_or_uneven():
    table = clean_table()
    labels = ["cat"] * 45 + ["dog", "owl", "dog"]
    splits = ["train"] * 40 + ["val"] * 4 + ["train"] * 2 + ["test"] * 2
    found = {
        finding.key: finding
        for finding in findings(audit(replace(table, listing=replace(table.listing, labels=labels), splits=splits)))
    }
    assert "cat (test), dog (val), owl (train), owl (val)" in found["classes-missing"].detail
    assert "dog" in found["classes-few"].detail
    assert "41 times" in found["classes-uneven"].title


def test_families_of_look_alikes_are_a_warning_and_no_leak():
    base = np.asarray(scene(50)).astype(float)
    rng = np.random.default_rng(0)
    alike = [
        encoded(Image.fromarray((base + rng.normal(0, 4, base.shape)).clip(0, 255).astype(np.uint8))) for _ in range(40)
    ]
    images = [*clean_table().listing.storage.encoded, *alike]
    found = audit(table_in_memory(images, ["cat", "dog"] * 44, ["train"] * 78 + ["test"] * 10))
    assert found.passed
    assert "look-alikes" in keys_of(found)
    page = Page(as_html(found))
    assert page.tags["img"] == 8
    assert "and 32 more" in page.text


def test_several_classes_an_image():
    labels = ["cat|dog", "dog", "", "cat"] * 12
    table = table_in_memory(
        clean_table().listing.storage.encoded, labels, ["train"] * 24 + ["test"] * 24, separator="|"
    )
    rng = np.random.default_rng(0)
    present = np.array([["cat" in label, "dog" in label] for label in labels])
    features = np.concatenate([5 * present, rng.normal(size=(48, 2))], 1) + rng.normal(size=(48, 4)) / 4
    features[8] = [5, 0, 0, 0]  # said to be cat and dog
    table.listing.labels[4] = "dog|cat"
    table.listing.storage.encoded[4] = table.listing.storage.encoded[0]
    found = audit(table, features=features.astype(np.float32))
    assert [cluster.rows for cluster in found.duplicates.clusters] == [(0, 4)]
    assert found.conflicts == []
    assert found.judgement is not None
    worst = found.judgement.suspects[0]
    assert (worst.row, worst.given, worst.suggested) == (8, ("cat", "dog"), ("cat",))
    assert as_json(found)["counts"] == {
        "cat": {"train": 12, "val": 0, "test": 12},
        "dog": {"train": 12, "val": 0, "test": 12},
    }
    as_html(found)


def test_long_lists_are_cut_in_the_page_and_whole_in_the_json(monkeypatch):
    contents = clean_table().listing.storage.encoded
    twice = [*contents, *contents, b"", b"1", b"2"]
    found = audit(table_in_memory(twice, ["cat"] * 99, ["train"] * 99))
    monkeypatch.setattr(reporting, "_CLUSTERS", 5)
    monkeypatch.setattr(reporting, "_LINES", 2)
    page = Page(as_html(found))
    assert page.tags["img"] == 10
    assert "The first 5 of 48 pictures; audit.json has all." in page.text
    assert "The first 2 of 3 unreadable files; audit.json has all." in page.text
    assert len(as_json(found)["duplicates"]) == 48


def test_files_are_written_and_pictures_that_went_away_meanwhile_are_missed(tmp_path):
    found = audit(faulty_table(tmp_path / "data"))
    for row in found.leaks[0].rows:
        (tmp_path / "data" / found.table.paths[row]).unlink()
    page, data = write_report(found, tmp_path / "new" / "report")
    assert (page.name, data.name) == ("audit.html", "audit.json")
    assert Page(page.read_text(encoding="utf-8")).tags["img"] == 6
    assert json.loads(data.read_text())["passed"] is False
    with (page.parent / "audit_groups.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["path"] for line in lines] == found.table.paths
    group = {line["path"]: line["group"] for line in lines}
    assert group["cat/copy of 1.png"] == group["cat/1.png"]
    assert len(set(group.values())) == 48 - 4


def test_an_inspection_made_before_is_used():
    table = clean_table()
    inspection = inspect(table.listing.storage, table.paths)
    calls = []

    def refuse(source):
        raise AssertionError

    found = audit(table, inspection=inspection, decode=refuse, progress=lambda *call: calls.append(call))
    assert found.inspection is inspection
    assert "reading" not in {stage for stage, _, _ in calls}
    audit(table, progress=lambda *call: calls.append(call))
    assert calls.count(("reading", 48, 48)) == 1


def test_mistakes_have_answers():
    table = clean_table()
    with pytest.raises(DataError, match=r"one line for each of 48 images, found 3"):
        audit(table, features=np.zeros((3, 4), np.float32))
    with pytest.raises(DataError, match=r"expected images to audit, found none"):
        audit(table_in_memory([], [], []))


def test_no_part_of_it_imports_a_training_library():
    for path in modules("datamodules/audit"):
        assert not any(
            reaches(path, library) for library in ("torch", "lightning", "timm", "albumentations", "pipeline")
        )


def test_one_image_is_an_audit_too():
    as_html(audit(table_in_memory([encoded(scene(0))], ["cat"], ["train"], ["a.png"])))
    as_html(audit(table_in_memory([b""], ["cat"], ["train"]), features=np.zeros((1, 3), np.float32)))
