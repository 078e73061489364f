"""Files that are old or whole: written aside, locked, checked when they are read."""
