"""The same picture more than once."""

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter

from datamodules.audit import neighbours
from datamodules.audit.candidates import ORIENTATIONS, describe, find_candidates, orient
from datamodules.audit.duplicates import find_duplicates
from datamodules.audit.inspection import inspect
from datamodules.audit.neighbours import nearest
from datamodules.audit.registration import colour, cut, displaced, register, shared, structure, whole
from datamodules.storage import MemoryStorage
from tests.audit_data import encoded, on_white, scene

SCENES = [encoded(scene(number)) for number in range(24)]


def search(contents, labels=None, splits=None, **options):
    names = [f"{row}.png" for row in range(len(contents))]
    inspection = inspect(MemoryStorage(contents), names, workers=1)
    return find_duplicates(inspection, labels or ["a"] * len(names), splits or ["train"] * len(names), **options)


def cropped(image, left, top, right, bottom):
    width, height = image.size
    return image.crop(
        (round(left * width), round(top * height), round((1 - right) * width), round((1 - bottom) * height))
    )


def enlarged(image, factor):
    return image.resize((round(image.width * factor), round(image.height * factor)))


COPIES = {
    "quality 30": encoded(scene(7), "JPEG", quality=30),
    "smaller": encoded(enlarged(scene(7), 0.4), "JPEG", quality=90),
    "larger": encoded(enlarged(scene(7), 1.5)),
    "squeezed": encoded(scene(7).resize((100, 120))),
    "a little cropped": encoded(cropped(scene(7), 0.02, 0.02, 0.02, 0.02)),
    "cropped": encoded(cropped(scene(7), 0.1, 0.1, 0.1, 0.1)),
    "cropped on one side": encoded(cropped(scene(7), 0.1, 0, 0.02, 0.06)),
    "everything": encoded(enlarged(cropped(scene(7), 0.03, 0.08, 0.06, 0.1), 0.6), "JPEG", quality=40),
    "darker": encoded(ImageEnhance.Brightness(scene(7)).enhance(0.6)),
    "less contrast": encoded(ImageEnhance.Contrast(scene(7)).enhance(0.6)),
    "grey": encoded(scene(7).convert("L")),
}
SOFT = [scene(number).filter(ImageFilter.GaussianBlur(9)) for number in range(24)]


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES.keys())
def test_changed_copies_are_near_duplicates(copy):
    (cluster,) = search([*SCENES, copy]).clusters
    assert cluster.rows == (7, 24)
    assert cluster.kind == "near"
    assert 0.83 <= cluster.similarity <= 1
    assert cluster.pairs[0].turned == ""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (Image.Transpose.FLIP_LEFT_RIGHT, {"mirrored"}),
        (Image.Transpose.FLIP_TOP_BOTTOM, {"mirrored and turned by 180 degrees"}),
        (Image.Transpose.ROTATE_180, {"turned by 180 degrees"}),
        (Image.Transpose.ROTATE_90, {"turned by 90 degrees", "turned by 270 degrees"}),
        (Image.Transpose.TRANSPOSE, {"mirrored and turned by 90 degrees", "mirrored and turned by 270 degrees"}),
    ],
)
def test_mirrored_and_turned_copies_are_found(change, words):
    (cluster,) = search([*SCENES, encoded(scene(3).transpose(change), "JPEG", quality=80)]).clusters
    assert cluster.rows == (3, 24)
    assert cluster.pairs[0].turned in words


def test_copies_of_soft_pictures_are_found_by_their_coarse_structure():
    pale = [Image.blend(picture, Image.new("RGB", picture.size, "grey"), 0.8) for picture in SOFT]
    (cluster,) = search([*(encoded(picture) for picture in pale), encoded(pale[3], "JPEG", quality=30)]).clusters
    assert cluster.rows == (3, 24)


def test_two_images_are_enough():
    assert search([SCENES[7], COPIES["everything"]]).clusters[0].rows == (0, 1)


def test_different_pictures_are_not_reported():
    assert search(SCENES).clusters == []


def test_different_things_on_the_same_board_are_not_reported():
    found = search([encoded(on_white(number), "JPEG", quality=85) for number in range(30)])
    assert found.clusters == []
    assert found.families == []


def test_identical_files_and_identical_pixels():
    found = search([*SCENES, SCENES[2], encoded(scene(5), "BMP")]).clusters
    assert [(cluster.rows, cluster.kind, cluster.similarity) for cluster in found] == [
        ((2, 24), "identical file", 1.0),
        ((5, 25), "same pixels", 1.0),
    ]


def test_copies_of_copies_are_one_cluster_and_the_loosest_kind_names_it():
    (cluster,) = search(
        [*SCENES, SCENES[7], encoded(scene(7), "BMP"), COPIES["cropped"], COPIES["quality 30"]]
    ).clusters
    assert cluster.rows == (7, 24, 25, 26, 27)
    assert {pair.kind for pair in cluster.pairs} == {"identical file", "same pixels", "near"}
    assert cluster.kind == "near"


def test_leaks_and_conflicts_come_first():
    contents = [*SCENES, SCENES[1], SCENES[2], SCENES[3]]
    labels = ["cat"] * 26 + ["dog"]
    splits = ["train"] * 25 + ["test", "train"]
    leak, conflict, plain = search(contents, labels, splits).clusters
    assert (leak.rows, leak.leaks, leak.conflict, leak.splits) == ((2, 25), True, False, ("train", "test"))
    assert (conflict.rows, conflict.leaks, conflict.conflict, conflict.labels) == ((3, 26), False, True, ("cat", "dog"))
    assert (plain.rows, plain.leaks, plain.conflict) == ((1, 24), False, False)


def test_images_that_cannot_be_read_and_empty_pictures():
    blank = [encoded(Image.new("RGB", (50 + number, 50), (200, 200, 200))) for number in range(3)]
    found = search([b"", SCENES[0], *blank, b"", encoded(Image.new("RGB", (50, 50), (200, 200, 200)))]).clusters
    assert [cluster.rows for cluster in found] == [(2, 6)]  # the same pixels; the others are of other sizes
    fading = [Image.linear_gradient("L").resize((w, 50)).point(lambda value: 200 + value // 64) for w in (60, 80)]
    assert search([encoded(picture) for picture in fading]).clusters == []
    assert search([b"", b""]).clusters == []
    assert search([SCENES[0]]).clusters == []


def test_what_a_camera_always_sees_is_a_family_and_hides_no_identical_files():
    base = np.asarray(scene(50)).astype(float)
    rng = np.random.default_rng(0)
    alike = [
        encoded(Image.fromarray((base + rng.normal(0, 4, base.shape)).clip(0, 255).astype(np.uint8))) for _ in range(40)
    ]
    found = search([*SCENES, *alike, alike[3], SCENES[4]])
    (family,) = found.families
    assert set(family.rows) == set(range(24, 64))
    assert [cluster.rows for cluster in found.clusters] == [(4, 65), (27, 64)]


def test_features_find_what_was_moved_far():
    moved = scene(11, 320, 240)
    contents = [*SCENES, encoded(moved.crop((0, 0, 240, 180))), encoded(moved.crop((44, 24, 284, 204)))]
    features = np.random.default_rng(0).normal(size=(26, 16)).astype(np.float32)
    assert search(contents).clusters == []
    features[25] = features[24] + 0.01
    (cluster,) = search(contents, features=features).clusters
    assert cluster.rows == (24, 25)


def test_progress_ends_with_all():
    calls = []
    search([*SCENES, COPIES["darker"]], progress=lambda *call: calls.append(call))
    assert calls[-1][0] == calls[-1][1] > 0


# Candidates


def test_each_pair_is_looked_at_once_and_no_image_with_itself():
    grey = inspect(MemoryStorage([*SCENES, *COPIES.values()]), ["a"] * 35, workers=1).grey
    found = find_candidates(grey)
    pairs = [tuple(sorted(pair)) for pair in zip(found.original.tolist(), found.copy.tolist(), strict=True)]
    assert len(pairs) == len(set(pairs))
    assert all(one != other for one, other in pairs)


def test_what_all_images_share_is_no_likeness():
    rng = np.random.default_rng(0)
    frame = np.kron(rng.normal(0, 50, (8, 8)), np.ones((8, 8)))
    images = np.stack([128 + frame + np.kron(rng.normal(0, 10, (16, 16)), np.ones((4, 4))) for _ in range(40)])
    assert len(find_candidates(images.clip(0, 255).astype(np.uint8))) < 20


@pytest.mark.parametrize("orientation", range(len(ORIENTATIONS)))
def test_orienting_undoes_what_was_done_to_a_copy(orientation):
    picture = np.random.default_rng(0).normal(size=(1, 8, 8)).astype(np.float32)
    copies = [orient(picture, number) for number in range(len(ORIENTATIONS))]
    assert sum(np.array_equal(orient(copy, orientation), picture) for copy in copies) == 1
    assert len({copy.tobytes() for copy in copies}) == 8


def test_descriptions_of_a_crop_and_of_the_original_without_its_margin_agree():
    grey = inspect(MemoryStorage(SCENES), ["a"] * 24, workers=1).grey
    smaller = inspect(
        MemoryStorage([encoded(cropped(scene(n), *[0.06] * 4)) for n in range(24)]), ["a"] * 24, workers=1
    ).grey
    nothing = np.zeros((64, 64), np.float32)
    agreement = (describe(grey, nothing, margin=2) * describe(smaller, nothing)).sum(1)
    assert agreement.min() > 0.99 > (describe(grey, nothing) * describe(smaller, nothing)).sum(1).max()


# Neighbours


def unit_rows(count, width, seed):
    rows = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_neighbours_are_those_of_brute_force():
    queries, rows = unit_rows(30, 8, 0), unit_rows(200, 8, 1)
    index, cosine = nearest(queries, rows, 5)
    expected = np.argsort(-(queries @ rows.T), axis=1)[:, :5]
    assert np.array_equal(index, expected)
    assert np.allclose(cosine, np.take_along_axis(queries @ rows.T, expected, 1))
    assert nearest(queries, rows[:3], 5)[0].shape == (30, 3)


def test_neighbours_in_cells_are_nearly_those_of_brute_force(monkeypatch):
    rng = np.random.default_rng(2)
    rows = unit_rows(3000, 24, 3)
    queries = rows[:2000] + 0.04 * rng.normal(size=(2000, 24)).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    monkeypatch.setattr(neighbours, "MOST_COMPARED", 1000)
    index, cosine = nearest(queries, rows, 3)
    assert (index[:, 0] == np.arange(2000)).mean() > 0.99
    assert (np.diff(cosine, axis=1) <= 0).all()
    assert all(len(set(line)) == 3 for line in index.tolist())
    again, _ = nearest(queries, rows, 3)
    assert np.array_equal(index, again)


# Registration


def likeness(image):
    inspection = inspect(MemoryStorage([encoded(image)]), ["a.png"], workers=1)
    return inspection.grey.astype(np.float32), inspection.chroma.astype(np.float32)


def test_the_part_that_a_copy_shows_is_found():
    for number in range(6):
        copy = cropped(scene(number), 0.04, 0.02, 0.08, 0.1)
        (region,) = register(likeness(scene(number))[0], likeness(copy)[0], whole(1, 0.06))
        assert region == pytest.approx([-0.02, 0.88, -0.04, 0.88], abs=0.012)


def test_how_far_a_picture_was_moved_is_seen():
    wide = scene(11, 320, 240)
    first, second = (likeness(wide.crop((x, y, x + 240, y + 180)))[0] for x, y in ((0, 0), (45, 17)))
    assert displaced(first, second)[0] == pytest.approx([45 / 240, 1, 17 / 180, 1], abs=0.01)
    assert displaced(second, first)[0] == pytest.approx([-45 / 240, 1, -17 / 180, 1], abs=0.01)


def test_agreement_of_structure_is_high_for_copies_alone_and_blind_to_light():
    first, second = (likeness(scene(number))[0] for number in (0, 1))
    everything = whole(1)
    assert structure(first, first, everything)[0] == pytest.approx(1, abs=1e-3)
    assert structure(first, 0.5 * first + 40, everything)[0] == pytest.approx(1, abs=1e-2)
    assert structure(first, 255 - first, everything)[0] == pytest.approx(-1, abs=1e-2)
    assert abs(structure(first, second, everything)[0]) < 0.3


def test_agreement_of_colour():
    first, second = (likeness(scene(number))[1] for number in (0, 1))
    everything = whole(1)
    assert colour(first, first, everything)[0] == pytest.approx(1, abs=1e-3)
    assert colour(first, first[:, ::-1], everything)[0] < 0.5
    assert colour(first, second, everything)[0] < 0.5
    assert colour(first, np.full_like(first, 128), everything)[0] == pytest.approx(1)


def test_the_same_shapes_in_other_colours_are_no_copies():
    luma, blue, red = scene(7).convert("YCbCr").split()
    swapped = Image.merge("YCbCr", [luma, red, blue]).convert("RGB")
    assert search([*SCENES, encoded(swapped)]).clusters == []


def test_regions():
    picture = np.arange(64 * 64, dtype=np.float32).reshape(1, 64, 64)
    same, inside = cut(picture, whole(1))
    assert np.allclose(same, picture)
    assert inside.all()
    half = np.array([[0.25, 0.5, 0.0, 1.0]], np.float32)  # the right half
    right, _ = cut(picture, half)
    assert right[0, :, 0] == pytest.approx(picture[0, :, 32] - 0.25, abs=0.01)
    beyond = np.array([[0.5, 1.0, 0.0, 1.0]], np.float32)
    assert cut(picture, beyond)[1].mean() == pytest.approx(0.5, abs=0.02)
    assert shared(np.concatenate([whole(1), half, beyond])) == pytest.approx([1, 0.5, 1 / 3])
