"""Studies of InfiniGen: what it remembers, which of its choices matter, and what its transfers cost."""
