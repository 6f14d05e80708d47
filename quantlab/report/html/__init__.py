"""The page of one or several runs: one self-contained HTML file, `report.html`."""

from quantlab.report.html.page import FILE_NAME, render_page, write_report

__all__ = ["FILE_NAME", "render_page", "write_report"]
