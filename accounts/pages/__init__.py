"""What the console's pages share: forms, figures, roles, long lists, the sign-in."""
