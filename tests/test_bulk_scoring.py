"""``predict`` into a folder: Parquet in parts, which outlives kills, changed folders and images that cannot be read."""

import csv
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from datamodules.errors import DataError
from datamodules.unlabelled import UnlabelledImages
from pipeline.cli import main
from pipeline.evaluation.predictions import Predictions
from pipeline.scoring import bulk
from pipeline.scoring.parts import Part, PartFolder
from tests.registered import Run

IN_PARTS = "import sys; from pipeline.scoring import bulk; bulk.IMAGES_A_PART = int(sys.argv.pop(1)); "
IN_PARTS += "from pipeline.cli import main; sys.exit(main())"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "IMAGES_A_PART", 7)


def command(run: Run, source: Path, output: Path) -> list[str]:
    where = [f"--ckpt_path={run.checkpoint}", f"--data.predict_path={source}", f"--output={output}"]
    return ["predict", *where, "--data.num_workers=0", "--trainer.accelerator=cpu", "--trainer.devices=1"]


def scored(output: Path) -> list[dict[str, Any]]:
    return pq.read_table(output).to_pylist()


def assert_as_tested(rows: Sequence[dict[str, Any]], run: Run) -> None:
    tested = {row["path"]: row for row in run.tested}
    assert len(rows) >= len(tested)
    found = {row["path"]: row for row in rows}
    for path, expected in tested.items():
        assert found[path]["label"] == expected["label"]
        assert found[path]["score"] == pytest.approx(float(expected["score"]), abs=1e-6)
        assert found[path]["error"] is None
        probabilities = [float(expected[f"p_{name}"]) for name in ("blue", "green", "red")]
        np.testing.assert_allclose(found[path]["probabilities"], probabilities, atol=1e-6)
        assert found[path]["label_id"] == int(np.argmax(probabilities))


def test_a_folder_is_scored_in_parts_as_it_was_tested(
    run: Run, small_parts: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "scores"
    assert main(command(run, run.images, output)) == 0
    assert [path.name for path in sorted(output.glob("*.parquet"))] == [f"part-{n:06}.parquet" for n in range(13)]
    rows = scored(output)
    assert [row["path"] for row in rows] == list(UnlabelledImages.of(str(run.images)))
    assert_as_tested(rows, run)
    shown = capsys.readouterr().out
    assert "7 of 90 images" in shown
    assert f"90 predictions in {output}" in shown
    # A second time there is nothing to do.
    before = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    assert main(command(run, run.images, output)) == 0
    assert f"90 predictions in {output}, 90 of them before" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in output.iterdir()} == before


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_manifest_is_scored_in_its_order(run: Run, small_parts: None, tmp_path: Path, kind: str) -> None:
    paths = [row["path"] for row in reversed(run.tested)]
    manifest = run.images / f"new.{kind}"
    if kind == "csv":
        with manifest.open("w", newline="") as file:
            csv.writer(file).writerows([["id", "path"], *enumerate(paths)])
    else:
        pq.write_table(pa.table({"id": range(len(paths)), "path": paths}), manifest)
    try:
        assert main(command(run, manifest, tmp_path / "scores.parquet")) == 0
    finally:
        manifest.unlink()
    rows = scored(tmp_path / "scores.parquet")
    assert [row["path"] for row in rows] == paths
    assert_as_tested(rows, run)


def test_images_that_cannot_be_read_are_rows_with_their_reason(
    run: Run, small_parts: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    good = run.images / run.tested[0]["path"]
    for number in range(10):
        (images / f"{number}.png").write_bytes(good.read_bytes())
    (images / "3.png").write_bytes(good.read_bytes()[:300])
    (images / "5.png").write_bytes(b"")
    (images / "6.png").unlink()
    (images / "6.png").symlink_to("nowhere")
    assert main(command(run, images, tmp_path / "scores")) == 0
    rows = {row["path"]: row for row in scored(tmp_path / "scores")}
    assert len(rows) == 10
    assert {path for path, row in rows.items() if row["error"]} == {"3.png", "5.png", "6.png"}
    assert rows["5.png"]["error"] == "it is empty"
    for name in ("label", "label_id", "score", "probabilities"):
        assert rows["3.png"][name] is None
    assert rows["4.png"]["label"] == run.tested[0]["label"]
    assert "3 of these images cannot be read" in capsys.readouterr().out


def test_of_several_classes_an_image_the_labels_are_a_list(tmp_path: Path) -> None:
    probabilities = np.array([[0.9, 0.7], [0.1, 0.2], [0.5, 0.5]])
    predictions = Predictions(np.full((3, 2), -1), probabilities, True, familiarity=np.array([0.5, 0.25, 1.0]))
    part = Part(0, tmp_path, ["both.png", "none.png", "broken.png"])
    PartFolder(tmp_path / "scores", {}).write(part, predictions, {2: "it is empty"}, ["a", "b"])
    assert scored(tmp_path / "scores") == [
        {"path": "both.png", "labels": ["a", "b"], "probabilities": [0.9, 0.7], "familiarity": 0.5, "error": None},
        {"path": "none.png", "labels": [], "probabilities": [0.1, 0.2], "familiarity": 0.25, "error": None},
        {"path": "broken.png", "labels": None, "probabilities": None, "familiarity": None, "error": "it is empty"},
    ]


def test_a_scoring_that_was_killed_goes_on_behind_its_last_part(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "scores"
    arguments = [sys.executable, "-c", IN_PARTS, "2", *command(run, run.images, output)]
    process = subprocess.Popen(arguments, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not (output / "part-000003.parquet").exists():
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    whole = {path.name: path.stat().st_mtime_ns for path in output.glob("part-*")}
    assert 4 <= len(whole) < 45
    monkeypatch.setattr(bulk, "IMAGES_A_PART", 2)
    assert main(command(run, run.images, output)) == 0
    assert f"90 predictions in {output}, {2 * len(whole)} of them before" in capsys.readouterr().out
    assert {name: (output / name).stat().st_mtime_ns for name in whole} == whole
    rows = scored(output)
    assert [row["path"] for row in rows] == list(UnlabelledImages.of(str(run.images)))
    assert_as_tested(rows, run)


def test_memory_does_not_grow_with_the_number_of_images(run: Run, small_parts: None, tmp_path: Path) -> None:
    """Ten times the parts take no more than the first ones did, but for what a process needs anyway."""
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (40, 40)).save(folder / "0.png")
    manifest = folder / "many.csv"
    peaks = []
    for count in (20, 200):
        manifest.write_text("path\n" + "0.png\n" * count)
        assert main(command(run, manifest, tmp_path / f"scores{count}")) == 0
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    assert peaks[1] - peaks[0] < 50, "megabytes"
    assert pq.read_table(tmp_path / "scores200").num_rows == 200


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("checkpoint", "was begun with another checkpoint"),
        ("views", "was begun with another test_time_augmentation (test_time_augmentation none)"),
        ("source", "was begun with another images"),
        ("images", "found others in part 0: images were added, removed or changed since"),
        ("content", "found others in part 0: images were added, removed or changed since"),
        ("other files", "holds something else"),
        ("a file", "holds something else"),
        ("ending", "expected a file name that ends in .csv, or a folder"),
        ("no images", "expected data.predict_path"),
    ],
)
def test_a_folder_of_another_scoring_is_left_alone(
    run: Run, small_parts: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str, text: str
) -> None:
    images, output = tmp_path / "images", tmp_path / "scores"
    images.mkdir()
    for row in run.tested[:8]:
        (images / Path(row["path"]).name).write_bytes((run.images / row["path"]).read_bytes())
    arguments = command(run, images, output)
    assert main(arguments) == 0
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    again = list(arguments)
    if change == "checkpoint":
        again[1] = f"--ckpt_path={run.folder / 'last.ckpt'}"
    elif change == "views":
        again.append("--model.test_time_augmentation=flip")
    elif change == "source":
        again[2] = f"--data.predict_path={run.images}"
    elif change == "images":
        Image.new("RGB", (9, 9)).save(images / "000a.png")
        Image.new("RGB", (9, 9)).save(images / "0.png")
    elif change == "content":
        Image.new("RGB", (40, 40)).save(min(images.iterdir()))
    elif change == "other files":
        again[3] = f"--output={images}"
    elif change == "a file":
        (tmp_path / "scores.parquet").write_text("mine")
        again[3] = f"--output={tmp_path / 'scores.parquet'}"
    elif change == "ending":
        again[3] = f"--output={tmp_path / 'scores.json'}"
    else:
        del again[2]
    capsys.readouterr()
    assert main(again) == 2
    assert text in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before


def test_numbers_are_paths_and_what_no_file_can_be_called_is_a_row(run: Run, small_parts: None, tmp_path: Path) -> None:
    good = (run.images / run.tested[0]["path"]).read_bytes()
    (tmp_path / "7").write_bytes(good)
    pq.write_table(pa.table({"path": [7, 8]}), tmp_path / "numbers.parquet")
    assert main(command(run, tmp_path / "numbers.parquet", tmp_path / "scores")) == 0
    assert [row["error"] is None for row in scored(tmp_path / "scores")] == [True, False]
    pq.write_table(pa.table({"path": ["7", "a\0b"]}), tmp_path / "odd.parquet")
    assert main(command(run, tmp_path / "odd.parquet", tmp_path / "others")) == 0
    assert [row["error"] is None for row in scored(tmp_path / "others")] == [True, False]


def test_a_folder_that_was_hardly_begun_is_gone_on_with(run: Run, small_parts: None, tmp_path: Path) -> None:
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "_scoring.json.part").write_text("{")
    assert main(command(run, run.images, tmp_path / "scores")) == 0
    assert_as_tested(scored(tmp_path / "scores"), run)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.png").touch()
    real = os.scandir

    def scandir(path: Any) -> Any:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"expected folders that can be listed, found '.*closed' \(Permission denied\)"):
        list(UnlabelledImages.of(str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.csv", "file\na.png\n", "expected a column path in '.*a.csv', found file"),
        ("a.csv", "", "expected a column path in '.*a.csv', found none"),
        ("a.csv", "path\n", "expected images in '.*a.csv', found none"),
        ("a.csv", "path\nb\0.png\n\udce4.png\n", "expected rows of separated values in UTF-8 in"),
        ("a.parquet", "PAR1 no", "expected Parquet with paths as text in"),
        ("a.txt", "path\n", "expected a folder of images, or a CSV or Parquet file with a column path, found '"),
    ],
)
def test_a_manifest_of_another_kind_is_refused(tmp_path: Path, name: str, content: str, text: str) -> None:
    (tmp_path / name).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=text):
        list(UnlabelledImages.of(str(tmp_path / name)))


@pytest.mark.slow
def test_two_processes_score_as_one_even_where_a_part_has_fewer_images_than_there_are_processes(
    run: Run, tmp_path: Path
) -> None:
    row = run.tested[0]
    manifest = run.images / "many.csv"
    manifest.write_text("path\n" + f"{row['path']}\n" * (bulk.IMAGES_A_PART + 1))
    arguments = [*command(run, manifest, tmp_path / "scores")[:-1], "--trainer.devices=2", "--trainer.strategy=ddp"]
    try:
        subprocess.run([sys.executable, "-m", "pipeline", *arguments], cwd=tmp_path, check=True)
    finally:
        manifest.unlink()
    assert [pq.read_metadata(path).num_rows for path in sorted((tmp_path / "scores").glob("*.parquet"))] == [10_000, 1]
    table = pq.read_table(tmp_path / "scores")
    assert set(table["label"].to_pylist()) == {row["label"]}
    np.testing.assert_allclose(table["score"].to_numpy(), float(row["score"]), atol=1e-6)
