"""`manage.py bench`: what the path around the model costs, and what one batch gains.

Measures from outside, over HTTP, on loopback: nothing here is imported by the web or the worker.
"""
