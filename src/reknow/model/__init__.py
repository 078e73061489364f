"""A decoder as it is: its parts, its tokens, its passes."""
