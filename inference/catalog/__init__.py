"""What is served, and to whom: models, variants, adapters and their aliases. Alone writes their rows."""
