"""The month's clock: who you are, what you may use, what you have used."""
