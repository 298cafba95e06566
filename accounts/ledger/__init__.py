"""What was used and what it costs: reserved before, settled after, summed up, proven."""
