"""What a config may say: its fields, the names in it, the claims under it."""
