"""What nobody asks for and everybody needs: ending what died, the month's chores, what is left on disk."""
