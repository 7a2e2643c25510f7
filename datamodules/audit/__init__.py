"""Finds and shows what goes wrong in people's image data. Imports neither torch nor ``pipeline``."""

from datamodules.audit.audit import Audit, audit
from datamodules.audit.findings import Finding, findings
from datamodules.audit.inspection import Inspection, inspect
from datamodules.audit.report import as_html, as_json, write_report

__all__ = [
    "Audit",
    "Finding",
    "Inspection",
    "as_html",
    "as_json",
    "audit",
    "findings",
    "inspect",
    "write_report",
]
