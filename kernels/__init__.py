"""Pallas kernels; imports jax alone, never kvjax.

A package here is an operation: `api.py` is what to call, `xla.py` its definition in plain JAX, `mosaic_gpu.py` and `mosaic_tpu.py` the
kernels, `tuned.json` block sizes measured on a card. Its cases, the reference they are checked against, and the shapes it is compiled at
stand with the tests, in tests/kernels. `attention` is what the library calls: it stands on the others, and has no kernel of its own.
"""

OPERATIONS = ("paged_attention", "prefill_attention", "h2o_evict", "speculate", "gather")
"""The operations that have kernels, by the names of their packages."""
