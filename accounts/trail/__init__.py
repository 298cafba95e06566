"""What was done and what was refused: the audit log and the refusals."""
