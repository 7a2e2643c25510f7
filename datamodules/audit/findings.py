"""What an audit found, in order of importance, each with what to do about it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from datamodules.audit.audit import Audit
from datamodules.splits import SPLITS

#: The setting that reads groups off paths.
GROUP_SETTING = "data.group_pattern"
#: The file with a group for each image, as :func:`~datamodules.audit.report.write_report` names it.
GROUPS_FILE = "audit_groups.csv"

_FEW = 10  # training images of a class
_UNEVEN = 10  # times as many images of the largest class as of the smallest
_MANY_SUSPECTS = 0.2  # share of the images; beyond it the features rather than the labels are to blame


@dataclass(frozen=True)
class Finding:
    """Something that a person should know.

    Attributes:
        key: stable, for programs.
        level: ``problem``: results cannot be trusted or training stops; ``warning``: worth a look; ``note``.
        title: what was found.
        detail: what it means.
        action: what to do.
        count: of images, pictures, groups or classes.
        section: of the report that shows it.
        setting: to copy into the configuration; empty: none.
    """

    key: str
    level: Literal["problem", "warning", "note"]
    title: str
    detail: str
    action: str
    count: int
    section: str
    setting: str = ""


def findings(audit: Audit) -> list[Finding]:
    """Everything that was found, the gravest first."""
    order = ("problem", "warning", "note")
    parts = (_unreadable, _leaks, _crossing, _conflicts, _labels, _shortcut, _suggested, _classes, _pictures, _files)
    return sorted(
        (finding for part in parts for finding in part(audit)), key=lambda finding: order.index(finding.level)
    )


def _of(count: int, what: str, several: str | None = None) -> str:
    plural = f"{what}s" if several is None else several
    return f"{count:,} {what if count == 1 else plural}"


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _unreadable(audit: Audit) -> Iterator[Finding]:
    count = len(audit.unreadable)
    if count:
        yield Finding(
            "unreadable",
            "problem",
            f"{_of(count, 'image')} cannot be read",
            "Training stops at the first of them.",
            "Replace or remove the files; each is named below with the reason.",
            count,
            "unreadable",
        )


def _leaks(audit: Audit) -> Iterator[Finding]:
    leaks = audit.leaks
    if not leaks:
        return
    splits = audit.table.splits
    parts = []
    for split in SPLITS[1:]:
        seen = sum(splits[row] == split for leak in leaks if "train" in leak.splits for row in leak.rows)
        if seen:
            total = splits.count(split)
            parts.append(
                f"{seen:,} of {total:,} {split} images ({seen / total:.1%}) have a copy, or nearly one, in training"
            )
    near = sum(1 for leak in leaks if leak.kind == "near")
    yield Finding(
        "leaks",
        "problem",
        f"{_of(len(leaks), 'picture')} {_are(len(leaks))} in more than one split",
        f"{len(leaks) - near or 'None'} as identical copies, {near or 'none'} as near ones. "
        + ("; ".join(parts) + ": results on them are too good." if parts else "Validation and test share pictures."),
        f"Delete all copies but one, or keep them on one side: {GROUPS_FILE} beside this report gives the copies of a "
        "picture one group.",
        len(leaks),
        "duplicates",
    )


def _crossing(audit: Audit) -> Iterator[Finding]:
    count = len(audit.crossing)
    if count:
        names = ", ".join(list(audit.crossing)[:3])
        yield Finding(
            "groups",
            "problem",
            f"{_of(count, 'group')} {_are(count)} in more than one split",
            f"The largest: {names}. A test on them asks for what was learned by heart.",
            "Draw the split anew, by groups: leave out the given splits.",
            count,
            "groups",
        )


def _conflicts(audit: Audit) -> Iterator[Finding]:
    count = len(audit.conflicts)
    if count:
        yield Finding(
            "conflicts",
            "problem",
            f"{_of(count, 'picture')} with copies of another label",
            "Of identical copies one label at most is right; near ones may differ in what the label is about.",
            "Look at them, decide, and correct the label or delete the other copies.",
            count,
            "duplicates",
        )


def _labels(audit: Audit) -> Iterator[Finding]:
    if audit.judgement is None:
        yield Finding(
            "labels-unjudged",
            "note",
            "Labels were not judged",
            "That needs features of a pretrained network.",
            "Give weights (model.weights) to have suspected wrong labels listed.",
            0,
            "labels",
        )
        return
    count = len(audit.judgement.suspects)
    if not count:
        return
    share = count / len(audit.table.paths)
    blame = " So many speak for classes that are hard to tell apart rather than for wrong labels." * (
        share > _MANY_SUSPECTS
    )
    yield Finding(
        "labels",
        "warning",
        f"{_of(count, 'label')} may be wrong ({share:.1%})",
        f"A simple classifier that never saw these images takes them for another class.{blame}",
        "Look at them; correct the label (move the file to the right class folder) or remove the image. Begin with "
        "those in test.",
        count,
        "labels",
    )


def _shortcut(audit: Audit) -> Iterator[Finding]:
    if audit.shortcut is not None:
        found = audit.shortcut
        yield Finding(
            "shortcut",
            "warning",
            f"The files alone tell the class ({found.accuracy:.0%} right, chance {found.chance:.0%})",
            f"By {', '.join(found.properties)}, without a look at the pictures. A network learns such a shortcut in "
            "place of the subject, and fails where it does not hold.",
            "Collect all classes in the same way, or bring all files to one size and format.",
            0,
            "files",
        )
    if audit.drift is not None:
        found = audit.drift
        yield Finding(
            "drift",
            "warning",
            f"The files of the splits differ ({found.accuracy:.0%} are told right, chance {found.chance:.0%})",
            f"By {', '.join(found.properties)}. The test may not be of what is trained on.",
            "Check that the splits were collected alike, if that is what the test should tell.",
            0,
            "files",
        )


def _suggested(audit: Audit) -> Iterator[Finding]:
    if not audit.suggestions:
        return
    best = audit.suggestions[0]
    crossing = max(suggestion.crossing for suggestion in audit.suggestions)
    if best.crossing:
        yield Finding(
            "group-names",
            "warning",
            f"File names suggest groups, and {best.crossing:,} of {best.groups:,} are in more than one split",
            f"Such as {best.example[1]} ({best.meaning}).",
            "If images of a group belong together, set:",
            best.crossing,
            "groups",
            f"{GROUP_SETTING}: '{best.pattern}'",
        )
    elif not crossing:
        yield Finding(
            "group-names",
            "note",
            f"File names suggest {best.groups:,} groups; none is in more than one split",
            f"Such as {best.example[1]} ({best.meaning}).",
            "Where you draw a new split, keep it so:",
            0,
            "groups",
            f"{GROUP_SETTING}: '{best.pattern}'",
        )


def _classes(audit: Audit) -> Iterator[Finding]:
    table = audit.table
    counts = {split: table.counts(split) for split in SPLITS}
    names = sorted(set().union(*counts.values()))
    present = [split for split in SPLITS if counts[split]]
    lacking = [f"{name} ({split})" for name in names for split in present if not counts[split][name]]
    if lacking:
        yield Finding(
            "classes-missing",
            "warning",
            f"{_of(len(lacking), 'time')} a class is missing from a split",
            f"{', '.join(lacking[:6])}{' ...' if len(lacking) > 6 else ''}.",
            "Add images, or leave the class out; nothing can be learned or measured of it there.",
            len(lacking),
            "classes",
        )
    few = [name for name in names if 0 < counts["train"][name] < _FEW]
    if few:
        yield Finding(
            "classes-few",
            "warning",
            f"{_of(len(few), 'class', 'classes')} with fewer than {_FEW} training images",
            f"{', '.join(few[:6])}{' ...' if len(few) > 6 else ''}.",
            "Add images, or join classes.",
            len(few),
            "classes",
        )
    sizes = [counts["train"][name] for name in names if counts["train"][name]]
    if sizes and max(sizes) >= _UNEVEN * min(sizes):
        yield Finding(
            "classes-uneven",
            "note",
            f"The largest class has {max(sizes) / min(sizes):.0f} times the training images of the smallest",
            "Accuracy then says little of the small classes.",
            "Go by macro-F1 (it is the monitor here, by default).",
            len(sizes),
            "classes",
        )


def _pictures(audit: Audit) -> Iterator[Finding]:
    families = audit.duplicates.families
    if families:
        images = sum(len(family.rows) for family in families)
        yield Finding(
            "look-alikes",
            "warning",
            f"{images:,} images look alike, in {_of(len(families), 'family', 'families')}",
            "So many that copies among them cannot be told from what the camera always sees; identical ones were found "
            "nevertheless.",
            "If they are frames of one film or parts of one thing, give them a group; otherwise this is how your "
            "pictures are.",
            images,
            "duplicates",
        )
    inside = [cluster for cluster in audit.duplicates.clusters if not cluster.leaks]
    if inside:
        extra = sum(len(cluster.rows) - 1 for cluster in inside)
        yield Finding(
            "duplicates",
            "warning",
            f"{_of(len(inside), 'picture')} {_are(len(inside))} more than once in one split ({extra:,} to spare)",
            "Copies count twice in training, and in a test they make its interval too narrow.",
            f"Delete all copies but one; or train from {GROUPS_FILE}, in which the copies of a picture are a group.",
            len(inside),
            "duplicates",
        )
    damaged, flat = audit.damaged, audit.flat
    if damaged:
        yield Finding(
            "damaged",
            "warning",
            f"{_of(len(damaged), 'image')} {_are(len(damaged))} cut short",
            "Their lower part is the flat grey that decoders put in place of missing data.",
            "Fetch the files again, or remove them.",
            len(damaged),
            "unreadable",
        )
    if flat:
        yield Finding(
            "flat",
            "warning",
            f"{_of(len(flat), 'image')} {'shows' if len(flat) == 1 else 'show'} nothing",
            "Every pixel has nearly the same shade.",
            "Remove them, unless an empty picture is what a class means.",
            len(flat),
            "unreadable",
        )


def _files(audit: Audit) -> Iterator[Finding]:
    if audit.misnamed:
        yield Finding(
            "misnamed",
            "warning",
            f"{_of(len(audit.misnamed), 'file')} with the wrong ending",
            "They are read by their content here; other programs go by the ending.",
            "Rename them.",
            len(audit.misnamed),
            "unreadable",
        )
    if audit.animated:
        yield Finding(
            "animated",
            "warning",
            f"{_of(len(audit.animated), 'file')} with several pictures",
            "Only the first picture of an animated or multi-page file is used.",
            "Save the pictures that you want as files of their own.",
            len(audit.animated),
            "unreadable",
        )
