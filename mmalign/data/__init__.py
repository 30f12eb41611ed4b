"""Data: loading, columns, chat templates and loss masks, packing, mixtures, and the small built-in assets."""
