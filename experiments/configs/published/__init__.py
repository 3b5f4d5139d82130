"""Published effects in miniature: each config asserts its claim at the end."""
