"""Many rows at once: the decode loop, its cache, tables of completions, resuming."""
