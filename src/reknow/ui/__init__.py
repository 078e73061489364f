"""The web page: an edit, its stack, questions to both models, where a fact sits, and runs side by side."""
