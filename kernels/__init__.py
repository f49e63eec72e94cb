"""Pallas kernels; imports jax alone, never kvjax."""
