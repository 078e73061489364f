"""Texts as people write them: spaces and words in any script, and prompts as templates."""
