"""Causal tracing: which states carry a fact."""
