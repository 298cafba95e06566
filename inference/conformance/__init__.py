"""Whether a running site speaks its dialects: each a list of checks over plain HTTP, with a key. No Django here.

`target.py` sends and reads, one module for each dialect says what must be, `matrix.py` runs them. Called by the command
conformance; any server that claims one of the dialects may be asked.
"""
