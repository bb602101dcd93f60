"""What frozen features are worth; each evaluator yields (name, value) and knows no logger."""
