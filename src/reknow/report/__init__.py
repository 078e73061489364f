"""A run folder as a page to read: HTML, Markdown, CSV, LaTeX and figures; several of them on one page."""

from reknow.report.comparison import write_comparison
from reknow.report.page import write_report

__all__ = ["write_comparison", "write_report"]
