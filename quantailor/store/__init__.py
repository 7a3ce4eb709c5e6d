"""Files: published whole, listed with their hashes, and not believed when they come from others."""
