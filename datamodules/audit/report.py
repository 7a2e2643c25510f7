"""An audit as a page for people and as JSON for programs."""

import csv
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from datamodules.audit.audit import Audit
from datamodules.audit.duplicates import Cluster
from datamodules.audit.findings import GROUPS_FILE, findings
from datamodules.audit.pictures import Thumbnails, inline
from datamodules.splits import SPLITS

#: Of the JSON; raised when a key changes its meaning or goes.
VERSION = 1

_SIDE = 160  # of the pictures in the page, in pixels
# How much of each list the page shows; the JSON has all.
_CLUSTERS = 48
_IMAGES_OF_CLUSTER = 8
_SUSPECTS = 60
_LINES = 200
_GROUPS = 50
_BINS = 12


def as_json(audit: Audit) -> dict[str, Any]:
    """The audit in plain types, for programs. Keys stay; a change raises ``version``.

    - ``version``, ``location`` (of the data), ``images`` (how many), ``passed``
    - ``findings``: ``key``, ``level``, ``title``, ``detail``, ``action``, ``setting``, ``count``, ``section``
    - ``counts``: images by class, then by split
    - ``files``: ``bytes``; images by ``formats``, ``modes``, ``channels``, ``bits``, ``sizes``
    - ``unreadable``: ``path``, ``label``, ``split``, ``problem``
    - ``misnamed``: ``path``, ``format``; ``animated``: ``path``, ``frames``; ``flat``: paths
    - ``damaged``: ``path``, ``missing`` (share of the picture)
    - ``duplicates``, ``families``: ``kind``, ``similarity``, ``leaks``, ``conflict``, ``images`` (``path``, ``label``,
      ``split``), ``pairs`` (``first``, ``second``, ``kind``, ``similarity``, ``turned``)
    - ``crossing_groups``: ``group``, ``splits`` (images in each)
    - ``group_suggestions``: as :class:`~datamodules.audit.groups.GroupSuggestion`
    - ``labels_judged``; ``suspects``: ``path``, ``split``, ``label``, ``suggested`` (lists of classes), ``score``
    - ``shortcut``, ``drift``: null, or ``accuracy``, ``chance``, ``properties``
    """
    table, facts = audit.table, audit.inspection.facts
    named = [
        {"path": path, "label": table.labels[row], "split": table.splits[row]} for row, path in enumerate(table.paths)
    ]
    readable = [fact for fact in facts if fact.problem is None]

    def plain(cluster: Cluster) -> dict[str, Any]:
        pairs = [
            {**asdict(pair), "first": table.paths[pair.first], "second": table.paths[pair.second]}
            for pair in cluster.pairs
        ]
        return {
            "kind": cluster.kind,
            "similarity": cluster.similarity,
            "leaks": cluster.leaks,
            "conflict": cluster.conflict,
            "images": [named[row] for row in cluster.rows],
            "pairs": pairs,
        }

    suspects = [] if audit.judgement is None else audit.judgement.suspects
    return {
        "version": VERSION,
        "location": table.listing.storage.location,
        "images": len(table.paths),
        "passed": audit.passed,
        "findings": [asdict(finding) for finding in findings(audit)],
        "counts": {name: {split: table.counts(split)[name] for split in SPLITS} for name in _classes(audit)},
        "files": {
            "bytes": sum(fact.bytes for fact in facts),
            "formats": _tally([fact.format for fact in readable]),
            "modes": _tally([fact.mode for fact in readable]),
            "channels": _tally([fact.channels for fact in readable]),
            "bits": _tally([fact.bits for fact in readable]),
            "sizes": _tally([f"{fact.width}x{fact.height}" for fact in readable]),
        },
        "unreadable": [{**named[row], "problem": facts[row].problem} for row in audit.unreadable],
        "misnamed": [{"path": table.paths[row], "format": facts[row].format} for row in audit.misnamed],
        "animated": [{"path": table.paths[row], "frames": facts[row].frames} for row in audit.animated],
        "damaged": [{"path": table.paths[row], "missing": round(facts[row].missing_rows, 4)} for row in audit.damaged],
        "flat": [table.paths[row] for row in audit.flat],
        "duplicates": [plain(cluster) for cluster in audit.duplicates.clusters],
        "families": [plain(cluster) for cluster in audit.duplicates.families],
        "crossing_groups": [{"group": group, "splits": dict(counts)} for group, counts in audit.crossing.items()],
        "group_suggestions": [asdict(suggestion) for suggestion in audit.suggestions],
        "labels_judged": audit.judgement is not None,
        "suspects": [
            {
                "path": table.paths[suspect.row],
                "split": table.splits[suspect.row],
                "label": list(suspect.given),
                "suggested": list(suspect.suggested),
                "score": round(suspect.score, 4),
            }
            for suspect in suspects
        ],
        "shortcut": None if audit.shortcut is None else asdict(audit.shortcut),
        "drift": None if audit.drift is None else asdict(audit.drift),
    }


def as_html(audit: Audit, made: datetime | None = None) -> str:
    """The audit as one page that needs no network and no scripts; names of files are shown, never interpreted.

    Args:
        audit: what was found.
        made: when; None: now.
    """
    table, facts = audit.table, audit.inspection.facts
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["thousands"] = "{:,}".format
    readable = [fact for fact in facts if fact.problem is None]
    picture = Thumbnails(table.listing.storage, audit.decode, _SIDE)
    examples = [
        (inline(original, _SIDE), [inline(variant, _SIDE) for variant in variants])
        for original, variants in audit.augmented
    ]
    template = resources.files("datamodules.audit").joinpath("report.html.j2").read_text(encoding="utf-8")
    page = environment.from_string(template).render(
        audit=audit,
        table=table,
        facts=facts,
        findings=findings(audit),
        splits=SPLITS,
        totals={split: table.splits.count(split) for split in SPLITS},
        counts={name: {split: table.counts(split)[name] for split in SPLITS} for name in _classes(audit)},
        tallies={
            "Format": _tally([fact.format for fact in readable]),
            "Mode": _tally([fact.mode for fact in readable]),
            "Bits": _tally([fact.bits for fact in readable]),
            "Size": _tally([f"{fact.width} x {fact.height}" for fact in readable]),
        },
        histogram=_histogram([min(fact.width, fact.height) for fact in readable]),
        megabytes=sum(fact.bytes for fact in facts) / 1e6,
        picture=picture,
        examples=examples,
        suspects=[] if audit.judgement is None else audit.judgement.suspects,
        limits={
            "clusters": _CLUSTERS,
            "images": _IMAGES_OF_CLUSTER,
            "suspects": _SUSPECTS,
            "lines": _LINES,
            "groups": _GROUPS,
        },
        odd=_odd_files(audit),
        made=(datetime.now(UTC) if made is None else made).strftime("%Y-%m-%d %H:%M UTC"),
    )
    # A file name may hold bytes that are no text; Python keeps them as lone surrogates, which no page can.
    return page.encode("utf-8", "backslashreplace").decode("utf-8")


def write_report(audit: Audit, folder: Path) -> tuple[Path, Path]:
    """Write ``audit.html``, ``audit.json`` and ``audit_groups.csv`` into a folder.

    The last is a manifest (``path``, ``label``, ``group``, and ``weight`` where there are any) under which a new split
    keeps copies of a picture, and given groups, on one side.

    Returns:
        The paths of the page and of the JSON.
    """
    folder.mkdir(parents=True, exist_ok=True)
    page, data = folder / "audit.html", folder / "audit.json"
    page.write_text(as_html(audit), encoding="utf-8")
    data.write_text(json.dumps(as_json(audit), indent=1) + "\n", encoding="utf-8")
    listing = audit.table.listing
    columns: dict[str, Sequence[str]] = {"path": listing.paths, "label": listing.labels, "group": audit.groups()}
    if listing.weights is not None:
        columns["weight"] = [f"{weight:g}" for weight in listing.weights]
    with (folder / GROUPS_FILE).open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return page, data


def _classes(audit: Audit) -> list[str]:
    return sorted(set().union(*(audit.table.counts(split) for split in SPLITS)))


def _tally(values: Sequence[object]) -> dict[str, int]:
    """How often each value comes, the commonest first."""
    return {str(value): count for value, count in Counter(values).most_common()}


def _histogram(values: Sequence[int]) -> list[tuple[str, int]]:
    """Counts in bins of equal ratio; one bin a value where there are few."""
    distinct = sorted(set(values))
    if len(distinct) <= _BINS:
        return [(f"{value:,}", values.count(value)) for value in distinct]
    edges = np.unique(np.geomspace(distinct[0], distinct[-1] + 1, _BINS + 1).round().astype(int))
    counts = np.histogram(values, edges)[0]
    return [(f"{low:,} to {high - 1:,}", int(n)) for low, high, n in zip(edges, edges[1:], counts, strict=False)]


def _odd_files(audit: Audit) -> list[tuple[int, str]]:
    """Rows of files that can be read but are not what they should be, each with what is odd."""
    facts = audit.inspection.facts
    return [
        *((row, f"the lower {facts[row].missing_rows:.0%} is missing") for row in audit.damaged),
        *(
            (row, "shows nothing: every pixel has nearly the same shade")
            for row in audit.flat
            if row not in audit.damaged
        ),
        *((row, f"holds {facts[row].format}, which its ending does not say") for row in audit.misnamed),
        *((row, f"{facts[row].frames:,} pictures in one file; the first is used") for row in audit.animated),
    ]
