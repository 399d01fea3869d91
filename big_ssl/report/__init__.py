"""`report.html` of a run: a function of what its work directory holds, so that it can be written again at any time."""
