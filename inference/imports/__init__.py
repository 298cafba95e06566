"""Models and adapters on their way in: uploaded or fetched into quarantine, checked, then registered.

addresses.py and connections.py say where from, fetching.py how; quarantine.py is the disk, desk.py the rows and who
works on them, checking.py the gates, importer.py the thread of the web that does it.
"""
