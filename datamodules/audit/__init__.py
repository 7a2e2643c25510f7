"""Finds and shows what goes wrong in people's image data. Imports neither torch nor ``pipeline``."""

from datamodules.audit.audit import Audit, audit
from datamodules.audit.findings import Finding, findings
from datamodules.audit.inspection import Inspection, content_digest, inspect
from datamodules.audit.report import as_html, as_json, write_report

__all__ = [
    "Audit",
    "Finding",
    "Inspection",
    "as_html",
    "as_json",
    "audit",
    "content_digest",
    "findings",
    "inspect",
    "write_report",
]
