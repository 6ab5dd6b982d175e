"""Files: atomic writing, locks, and reading of untrusted content."""
