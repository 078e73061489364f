"""Inside In-Context Editing (Qi et al. 2024, arXiv 2406.11194): its figures, and its script's reading of PPL_r."""
