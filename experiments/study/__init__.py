"""The study: what each strategy costs and loses, over request rates, model sizes, budgets, contexts, batches, and mixes of requests."""
