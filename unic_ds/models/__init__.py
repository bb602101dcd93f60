"""The student: a ViT encoder and its ladder of projectors."""
