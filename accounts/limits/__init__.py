"""What one may use at a time: bounds of plan, tenant and key, rules for a time, and the minute's counts."""
