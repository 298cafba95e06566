"""Programs that tests start as children."""
