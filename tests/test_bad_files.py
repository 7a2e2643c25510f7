"""Bad files, one by one: each is read or refused in one clear line, in seconds, in little memory, and runs nothing."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from datamodules import DataError
from datamodules.checking import unreadable_images
from datamodules.dataset import ImageDataset
from datamodules.decode import EncodedImage, decode
from datamodules.storage import FileStorage, require_inside
from tests.bad_files import (
    CIRCLE,
    GIF,
    PICTURE,
    REFUSED,
    REFUSED_ARRAYS,
    WEBP,
    odd_but_sound,
    pickled,
    planes,
    png,
    scans,
    zeros,
)
from tests.images import encoded, preprocessing, smooth

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")

ROOT = Path(__file__).resolve().parents[1]
SOUND = {name: (content, pixels) for name, content, pixels in odd_but_sound()}
ONE_BY_ONE = [(3, "uint8", name, *case) for name, case in REFUSED.items()]
ONE_BY_ONE += [(1, "uint16", name, *case) for name, case in REFUSED_ARRAYS.items()]


@pytest.mark.parametrize(
    ("channels", "dtype", "name", "content", "said"), ONE_BY_ONE, ids=lambda value: str(value)[:30]
)
def test_a_bad_file_is_refused_in_one_clear_line(channels, dtype, name, content, said):
    with pytest.raises(OSError, match=said) as caught:
        EncodedImage(content, channels, dtype).pixels()
    line = str(caught.value)
    assert line
    assert "\n" not in line
    assert len(line) < 200


@pytest.mark.parametrize("name", SOUND)
def test_an_odd_file_is_read_as_what_it_shows(name):
    content, pixels = SOUND[name]
    image = EncodedImage(content)
    found = image.pixels()
    assert found.shape == (image.height, image.width, 3)
    assert found.dtype == np.uint8
    if pixels is not None:
        assert np.array_equal(found, pixels())


def test_of_an_animation_the_first_frame_is_read():
    first = decode(SOUND["animated.gif"][0]).astype(int)
    assert np.abs(first - np.asarray(PICTURE)).mean() < 20
    assert np.abs(first - (255, 0, 0)).mean() > 50


# In a process that may not take much memory, and not long


TRIAL = """
import io, json, logging, resource, sys, time, warnings
from pathlib import Path
import imagecodecs, tifffile
from PIL import Image
from datamodules.decode import EncodedImage, decode
warnings.simplefilter("ignore")
logging.disable()
Image.new("RGB", (9, 9)).save(buffer := io.BytesIO(), "JPEG")
decode(buffer.getvalue())
pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
taken = pages * resource.getpagesize() + int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_AS, (taken, resource.getrlimit(resource.RLIMIT_AS)[1]))
for folder in sorted(Path(sys.argv[1]).iterdir()):
    channels, dtype = folder.name.split()
    for file in sorted(folder.iterdir()):
        began = time.perf_counter()
        try:
            EncodedImage(file, int(channels), dtype).pixels()
            said = "read"
        except OSError as error:
            said = str(error)
        print(json.dumps([f"{folder.name} {file.name}", said, time.perf_counter() - began]), flush=True)
"""


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, float]]:
    """What is said of every bad file, and how long it took, by a process that has 300 MB to spare."""
    home = tmp_path_factory.mktemp("trial")
    colours = home / "files" / "3 uint8"
    for channels, dtype, name, content, _ in ONE_BY_ONE:
        (home / "files" / f"{channels} {dtype}").mkdir(parents=True, exist_ok=True)
        (home / "files" / f"{channels} {dtype}" / name).write_bytes(content)
    for name, (content, _) in SOUND.items():
        (colours / name).write_bytes(content)
    (colours / "zip bomb.png").write_bytes(png(13_000, 13_000, zeros(13_000 * 13_001), colour=0))
    os.mkfifo(colours / "pipe.jpg")
    (colours / "endless.jpg").symlink_to("/dev/zero")
    (colours / "folder.jpg").mkdir()
    (colours / "nowhere.jpg").symlink_to("not there")
    (colours / "circle.jpg").symlink_to("circle.jpg")
    with (colours / "long.jpg").open("wb") as file:
        file.truncate(2**33)
    command = [sys.executable, "-c", TRIAL, str(home / "files"), str(300 * 2**20)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(path.name for path in home.iterdir()) == ["files"], "a file has done something"
    return {name: (said, seconds) for name, said, seconds in map(json.loads, done.stdout.splitlines())}


def test_no_bad_file_takes_long_or_much_memory(trial):
    slow = {name: seconds for name, (_, seconds) in trial.items() if seconds > 5}
    assert slow == {}
    assert len(trial) == len(ONE_BY_ONE) + len(SOUND) + 7


def test_odd_files_are_read_where_memory_is_scarce(trial):
    assert {name: trial[f"3 uint8 {name}"][0] for name in SOUND} == dict.fromkeys(SOUND, "read")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("zip bomb.png", "it does not fit into memory"),
        ("pipe.jpg", "it is no regular file"),
        ("endless.jpg", "it is no regular file"),
        ("folder.jpg", "it is no regular file"),
        ("nowhere.jpg", "No such file"),
        ("circle.jpg", "Too many levels of symbolic links"),
        ("long.jpg", "it has 8,589,934,592 bytes, more than any image"),
    ],
)
def test_what_is_no_file_is_refused_at_once(trial, name, said):
    assert said in trial[f"3 uint8 {name}"][0]


def test_a_pickle_in_an_array_is_never_loaded(tmp_path):
    made = tmp_path / "made by a pickle"
    content = pickled(made)
    for channels, dtype in ((3, "uint8"), (1, "float32")):
        with pytest.raises(OSError, match="Python objects, which are never loaded"):
            decode(content, channels, dtype)
    assert not made.exists()


def test_no_other_file_counts_that_an_image_names(tmp_path, monkeypatch):
    # A TIFF of microscopes may name the files in which its pictures lie.
    monkeypatch.chdir(tmp_path)
    head = (
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0"><Pixels ID="Pixels:0" '
        'DimensionOrder="XYCZT" Type="uint16" SizeX="48" SizeY="40" SizeC="1" SizeZ="1" SizeT="1"><TiffData IFD="0" '
        'PlaneCount="1"><UUID FileName="other.tif">urn:uuid:1</UUID></TiffData></Pixels></Image></OME>'
    )
    for name, value in (("own.tif", 3), ("other.tif", 7)):
        tifffile.imwrite(name, np.full((40, 48), value, np.uint16), description=head, compression="zlib")
    for source in ("own.tif", Path("own.tif").read_bytes()):
        assert (decode(source, 1, "uint16") == 3).all()


def test_pages_of_an_array_may_follow_in_a_circle():
    assert (decode(CIRCLE, 1, "uint16") == np.zeros((9, 9, 1))).all()


def test_scans_are_counted_where_they_count():
    few, many = scans(64, 64, 100), scans(64, 64, 101)
    assert decode(few).shape == (64, 64, 3)
    with pytest.raises(OSError, match="more than 100 scans"):
        decode(many)
    # Of the other kind there may be many where not all components are in the first.
    assert decode(planes(1, 1)).shape == (64, 64, 3)
    assert decode(planes(3, 3)).shape == (64, 64, 3)
    with pytest.raises(OSError, match="more than 100 scans"):
        decode(planes(3, 200))


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_flat_picture_is_not_taken_for_a_truncated_one(mode):
    flat = Image.new(mode, (4000, 4000), 9)
    assert decode(encoded(flat, "JPEG", progressive=True, optimize=True)).shape == (4000, 4000, 3)


# Cut short


CUT = {
    "JPEG": encoded(PICTURE, "JPEG"),
    "progressive JPEG": encoded(PICTURE, "JPEG", progressive=True),
    "PNG": encoded(PICTURE, "PNG"),
    "GIF": GIF,
    "WebP": encoded(PICTURE, "WEBP"),
    "lossless WebP": WEBP,
    "BMP": encoded(PICTURE, "BMP"),
    "TIFF": encoded(PICTURE, "TIFF"),
    "TIFF, LZW": encoded(PICTURE, "TIFF", compression="tiff_lzw"),
    "TIFF, deflate": encoded(PICTURE, "TIFF", compression="tiff_deflate"),
}


@pytest.mark.parametrize("simple", [True, False], ids=["simplejpeg", "Pillow"])
@pytest.mark.parametrize("kind", CUT)
def test_a_file_cut_short_anywhere_is_refused_or_whole_all_the_same(kind, simple, monkeypatch, capfd):
    if not simple:
        monkeypatch.setattr("datamodules.decode.simplejpeg", None)
    content = CUT[kind]
    whole = {share: EncodedImage(content).pixels(share) for share in (1.0, 1 / 8)}
    refused = 0
    for length in {*range(0, len(content), max(1, len(content) // 60)), *range(len(content) - 20, len(content))}:
        for share, expected in whole.items():
            try:
                found = EncodedImage(content[:length]).pixels(share)
            except OSError:
                refused += 1
            else:
                assert np.array_equal(found, expected), (kind, length, share)
    assert refused > 60


def test_a_damaged_image_that_passes_the_trial_can_be_read_at_any_scale(capfd):
    # Before training all images are tried at an eighth; one that failed at another scale would end the run.
    rng = np.random.default_rng(0)
    for progressive in (False, True):
        content = encoded(Image.fromarray(smooth(80, 96)), "JPEG", progressive=progressive)
        outcomes = []
        for _ in range(150):
            damaged = bytearray(content)
            for place in rng.integers(len(damaged), size=2):
                damaged[place] = rng.integers(256)
            read = []
            for share in (1 / 8, 1 / 4, 1 / 2, 1.0):
                try:
                    EncodedImage(bytes(damaged)).pixels(share)
                except OSError:
                    read.append(False)
                else:
                    read.append(True)
            assert len(set(read)) == 1
            outcomes.append(read[0])
        assert 10 < sum(outcomes) < 140


# Through the trial of a data set, and where files may lie


def test_all_unreadable_images_are_found_with_their_reasons(tmp_path):
    files = {**{name: content for name, (content, _) in REFUSED.items()}, **{n: c for n, (c, _) in SOUND.items()}}
    files = {name: content for name, content in files.items() if not name.startswith("many")}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "gone.jpg").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.jpg")
    names = [*files, "gone.jpg", "pipe.jpg"]
    storage = FileStorage(tmp_path, names)
    dataset = ImageDataset(storage, range(len(names)), np.zeros(len(names), np.int64), preprocessing(), None, 0)
    told: list[tuple[int, int]] = []
    found = unreadable_images(dataset, lambda done, total: told.append((done, total)))
    assert {names[row] for row in found} == {name for name in names if name not in SOUND}
    for row, reason in found.items():
        assert re.search(REFUSED[names[row]][1] if names[row] in REFUSED else "No such file|no regular file", reason)
    assert told == [(done, len(names)) for done in range(1, len(names) + 1)]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("../outside.png", "outside.png', which leads out of it"),
        ("a/../../outside.png", "outside.png', which leads out of it"),
        ("link.png", "link.png', which leads out of it"),
        ("linked/x.png", "x.png', which leads out of it"),
        ("gone.png", "nothing at '"),
        ("circle.png", "nothing at '"),
        ("circle/x.png", "nothing at '"),
        ("absent.png", "nothing at '"),
        ("nul\0.png", r"nothing at '.*nul\\x00.png"),
        ("nul\0/x.png", r"nothing at '.*nul\\x00/x.png"),
        ("x" * 300 + ".png", "nothing at '"),
        ("line\nend.png", r"nothing at '.*line\\nend.png"),
        ("folder.png", "folder.png', which is no regular file"),
        ("pipe.png", "pipe.png', which is no regular file"),
    ],
)
def test_only_regular_files_inside_the_folder_are_accepted(tmp_path, path, said):
    root = (tmp_path / "root").resolve()
    (root / "a").mkdir(parents=True)
    for place in (root / "inside.png", tmp_path / "outside.png", tmp_path / "elsewhere" / "x.png"):
        place.parent.mkdir(exist_ok=True)
        PICTURE.save(place)
    (root / "link.png").symlink_to(tmp_path / "outside.png")
    (root / "fine.png").symlink_to("inside.png")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "gone.png").symlink_to("nowhere")
    (root / "circle.png").symlink_to("circle.png")
    (root / "circle").symlink_to("circle")
    (root / "folder.png").mkdir()
    os.mkfifo(root / "pipe.png")
    require_inside(root, ["inside.png", "fine.png", "a/../inside.png"], "data.root")
    with pytest.raises(DataError, match=said) as caught:
        require_inside(root, ["inside.png", path, path], "data.root")
    line = str(caught.value)
    assert line.startswith("data.root: expected image files in '")
    assert "(and 1 more like it)" in line
    assert "\n" not in line
