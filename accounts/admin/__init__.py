"""The operator's pages of the month's rows, a module for each family of screens. Django imports it.

What is saved announces itself to all processes.
"""

from accounts.admin import billing, keys, ledger, limits, people, tenants, trail

__all__ = ["billing", "keys", "ledger", "limits", "people", "tenants", "trail"]
