"""What memories share: texts as vectors, nearest neighbours, the scope of an edit."""
