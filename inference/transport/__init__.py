"""What travels between web and workers, through Redis: tickets, doorbells, events, orders for models."""
