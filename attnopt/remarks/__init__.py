"""Remarks: what was done or not done to each attention, and why. Every remark has a stable code.

AO1xx applied, AO2xx missed, AO3xx analysis, AO9xx error. ``PAGES`` is the one table that names them; ``docs/remarks`` is written from it.
"""

from __future__ import annotations

from attnopt.remarks.page import Page
from attnopt.remarks.remark import NOT_ATTENTION, PAGES, Level, NodeInfo, Remark

__all__ = ["NOT_ATTENTION", "PAGES", "Level", "NodeInfo", "Page", "Remark"]
