"""Studies and evaluations of language models."""
