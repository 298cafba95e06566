"""A tenant that leaves: all of it in one file, and nothing of it left."""
