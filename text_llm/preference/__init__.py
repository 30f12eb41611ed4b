"""Preference methods for text."""
