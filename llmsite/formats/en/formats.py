"""Moments as an operator compares them: sortable, to the second, in UTC. Read by Django's template and admin layer."""

DATETIME_FORMAT = "Y-m-d H:i:s"
DATE_FORMAT = "Y-m-d"
TIME_FORMAT = "H:i:s"
