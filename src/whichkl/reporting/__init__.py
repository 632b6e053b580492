"""Report: a result → one self-contained HTML file, readable on a phone, in light and in dark."""

from whichkl.reporting.dispatch import report
from whichkl.reporting.page import Block, Section, write_page

__all__ = ["Block", "Section", "report", "write_page"]
