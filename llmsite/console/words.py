"""How the console shows words that are written for several readers: a library of templates.

Help texts of fields are Markdown in the OpenAPI document, where `this` is code; so it is on a page.
"""

from __future__ import annotations

import re

from django import template
from django.utils.safestring import SafeString, mark_safe

register = template.Library()
CODE = re.compile(r"`([^`\n]+)`")


@register.filter
def with_code(text: object) -> SafeString:
    """Of a help text, which is HTML already, as Django has it."""
    return mark_safe(CODE.sub(r"<code>\1</code>", str(text)))
