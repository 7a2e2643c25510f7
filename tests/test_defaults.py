"""What the comparison of every default with what it replaces makes of results."""

import csv
from pathlib import Path
from typing import Any

import pytest
from cases import Case, Image
from defaults import CASES, ROWS, main, rates, table, times
from PIL.Image import new as new_image
from PIL.Image import open as open_image
from transfer import Workplace

CASE = next(iter(CASES))


def result(name: str, seed: int, accuracy: float, log_loss: float, case: str = CASE) -> dict[str, Any]:
    return {"case": case, "contestant": name, "seed": seed, "accuracy": accuracy, "log_loss": log_loss}


def test_a_row_is_what_a_change_brings_seed_by_seed() -> None:
    row = ROWS[0]
    chosen = [result("ours", 0, 0.70, 0.9), result("ours", 1, 0.80, 0.7), result("ours", 2, 0.75, 0.8)]
    # Seed 2 was not run without it.
    changed = [result(row.name, 0, 0.69, 1.0), result(row.name, 1, 0.77, 0.8)]
    (line,) = [line for line in table([*chosen, *changed], ROWS).splitlines() if row.name in line]
    # The mean of -1 and -3 points; 12.7 = the t quantile of one degree of freedom, times a standard error of 1.
    assert f"| {row.name} | -2.0 ± 12.7<br>+0.100 |" in line


def test_rows_that_were_not_run_are_not_shown() -> None:
    shown = table([result("ours", 0, 0.7, 0.9)], ROWS)
    assert not any(row.name in shown for row in ROWS)
    assert "| **as chosen: accuracy** | 70.0 | 70.0 |" in shown


def test_changes_go_by_what_was_chosen() -> None:
    chosen = {"trainer.max_epochs": 5, "model.learning_rate": 3e-5, "model.head_learning_rate": 6e-5}
    assert times("trainer.max_epochs", 0.5)(chosen) == ["--trainer.max_epochs=2"]
    assert rates(3)(chosen) == ["--model.learning_rate=9e-05", "--model.head_learning_rate=0.00018"]


def test_no_two_rows_have_a_name() -> None:
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)
    assert all(case in CASES for row in ROWS for case in row.cases)


def test_help_names_the_rows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["defaults.py", "--help"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    # A per cent sign in a name is no format.
    assert "15 % held out" in " ".join(capsys.readouterr().out.split())


def test_what_develops_is_never_what_the_benchmark_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [Image(f"{number}.png", "ab"[number % 2], str(number // 3)) for number in range(300)]
    monkeypatch.setattr(Workplace, "images", lambda *_: images)
    workplace = Workplace(tmp_path / "work", tmp_path, epochs=None)

    def groups(tables: Path, split: str) -> set[int]:
        with (tables / f"{split}.csv").open(newline="") as file:
            return {int(Path(row["path"]).stem) // 3 for row in csv.DictReader(file)}

    for seed in range(3):
        compared = workplace.prepare(Case("trash", few=False), seed)
        develops = workplace.prepare(Case("trash", few=False, development=True), seed)
        assert groups(develops, "train") | groups(develops, "test") == groups(compared, "train")
        assert not groups(develops, "train") & groups(develops, "test")


def test_smaller_copies_are_made_once_and_divided_as_the_images_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "images"
    (root / "a").mkdir(parents=True)
    new_image("RGB", (300, 200), (250, 20, 20)).save(root / "a" / "1.png")
    new_image("L", (50, 80), 90).save(root / "a" / "2.png")
    monkeypatch.setattr(Workplace, "root", lambda *_: root)
    monkeypatch.setattr(Workplace, "images", lambda *_: [Image(f"a/{n}.png", "a", str(n)) for n in (1, 2)])
    workplace, small = Workplace(tmp_path / "work", tmp_path, epochs=None), Case("trash", few=False, short_side=40)
    assert str(small) == "trash-full-40px"

    for _ in range(2):
        copies = workplace.root_of(small)
    with open_image(copies / "a" / "1.png") as wide, open_image(copies / "a" / "2.png") as high:
        assert (wide.size, high.size) == ((60, 40), (40, 64))
        assert wide.getpixel((30, 20)) == (250, 20, 20)
    assert [path.name for path in workplace.folder.iterdir() if "tmp" in path.name] == []
    assert str(copies) in (workplace.prepare(small, 0) / "train.csv").read_text()
    assert workplace.root_of(Case("trash", few=False)) == root
