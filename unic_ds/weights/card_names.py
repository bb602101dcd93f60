"""Names that the writers and the readers of a model card share. Stdlib only."""

FILE = "README.md"
KEY = "unic_ds"
"""Key of the metadata that is this package's own: `teachers`, and `licence` of imported weights."""
WEIGHTS = "these weights"
"""Name of the weights in the folder, on its card and in the card's warnings."""
