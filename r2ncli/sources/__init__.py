"""Find the inputs among what the user typed, and read their bytes."""
