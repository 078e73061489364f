"""The studies of InstructEdit (Tian et al. 2024, arXiv 2402.16123)."""
