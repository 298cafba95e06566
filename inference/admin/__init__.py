"""The operator's pages of models, adapters and receipts, a module for each family of screens. Django imports it.

Rooms that have tables of their own have their pages beside them; they are imported from here.
"""

from inference.admin import adapters, aliases, receipts, served_models, variants
from inference.batches import admin as batches
from inference.imports import admin as imports
from inference.tuning import admin as optimizations

__all__ = ["adapters", "aliases", "batches", "imports", "optimizations", "receipts", "served_models", "variants"]
