"""Sources: one small adapter for each kind of input of make_shards.py (which lists them)."""
