"""How a model's layers become programs, and the programs that every caller shares."""
