"""Questions asked afterwards: what became of a request, would it answer the same, what runs now."""
