"""The console beyond rows: dashboard, playground, live pages, and the door in front of them."""
