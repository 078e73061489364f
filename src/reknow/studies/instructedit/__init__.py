"""The studies of InstructEdit (Zhang et al. 2024, arXiv 2402.16123)."""
