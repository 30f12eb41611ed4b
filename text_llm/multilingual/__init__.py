"""Multilingual recipes."""
