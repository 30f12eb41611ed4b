"""Supervised methods for text."""
