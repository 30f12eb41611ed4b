"""First-order logic: formulas, their text, how equivalent two of them are, edits, and a corpus of sentences with formulas."""
