"""From what a tenant asks to a ticket, or a refusal that charges nothing. On admission threads of the web."""
