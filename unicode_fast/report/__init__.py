"""Pictures of runs, tables of several runs beside published numbers, and the command that makes them."""
