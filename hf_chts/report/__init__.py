"""Figures of a run, and the report of one or several."""

from hf_chts.report.writing import write_report

__all__ = ["write_report"]
