"""Write results to files, and read finished files back."""
