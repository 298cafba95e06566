"""How long the lists of the console and of the API take at 100,000 keys: rows made in bulk, every list asked for.

`manage.py bench_lists` runs it on databases of its own (child.py); the tests fill theirs with a few rows.
"""
