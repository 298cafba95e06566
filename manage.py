#!/usr/bin/env python
"""Django's command line: `python manage.py help` lists every verb.

`up` and `doctor` are taken before Django loads: one must stay small, the other must work when the settings are wrong.
"""

import os
import sys


def main() -> int:
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "llmsite.settings")
    verb, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("help", [])
    if verb == "up":
        from llmsite.processes import supervisor

        return supervisor.main(arguments)
    if verb == "doctor":
        from llmsite import doctor

        return doctor.main(arguments)
    from django.core.management import execute_from_command_line

    execute_from_command_line(sys.argv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
