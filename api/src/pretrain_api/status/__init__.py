"""Status, records and reports of a run."""
