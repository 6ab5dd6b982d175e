"""Files of every kind: written whole or not at all, locked, and read without trust in what they hold."""
