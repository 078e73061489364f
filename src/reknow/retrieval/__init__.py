"""What methods with a memory share: texts as vectors, nearest neighbours, the scope of an edit."""
