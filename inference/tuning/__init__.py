"""Which file format and which settings serve a model fastest on this machine: `manage.py optimize_model`.

formats.py names the formats, native.py runs llama.cpp in a child, steps.py starts and kills that child, choice.py
decides (pure), search.py is the order of a run, workshop.py the folder where files are made. inference/variants.py
keeps the result.
"""
