"""Reports of a run, read from its folder: its record, findings about it, and views of both."""
