"""One file a measurement. Importing them imports no torch; measuring does."""
