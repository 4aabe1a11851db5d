"""What is in a graph: counts for the terminal and for programs, and a page with the graph drawn per layer."""

from qcompile.report.summary import ModelSummary, summarize

__all__ = ["ModelSummary", "summarize"]
