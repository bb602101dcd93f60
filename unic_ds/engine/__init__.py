"""DeepSpeed engine, optimiser and weight averaging."""
