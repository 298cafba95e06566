"""Which file format and settings serve a model fastest on this machine: for `manage.py optimize_model` and the console.

formats.py names the formats, native.py runs llama.cpp in a child, steps.py starts and kills that child, choice.py
decides (pure), search.py is the order of a run, workshop.py the folder where files are made. optimizer.py brings a run
from its row, which desk.py writes, to its table (report.py); admin.py shows it, catalog/variants.py keeps the result.
"""
