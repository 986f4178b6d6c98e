"""Inner data structures of the library, which no public name shows."""
