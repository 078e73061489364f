"""Files that are old or whole: written atomically, locked, checked when they are read."""
