"""Slots as tenants see them: questions to the worker that holds them, and their states on disk."""
