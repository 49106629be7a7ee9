"""The report: a plain record of an examination, and one renderer a format."""
