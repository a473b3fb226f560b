"""What an optimization did: sites, remarks, verdict, and each of them explained. Plain data, printable anywhere."""

from __future__ import annotations

from attnopt.report.report import Check, Report, Site, Status, Verdict

__all__ = ["Check", "Report", "Site", "Status", "Verdict"]
