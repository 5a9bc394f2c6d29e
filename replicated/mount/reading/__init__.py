"""Where the bytes of a mount come from, and what is read before anybody asks for it."""
