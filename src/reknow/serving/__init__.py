"""A server that speaks OpenAI's protocol: one base model in memory, and a stack of patches for each model's name."""
