"""One file a world (physics, web, tools, pixels), and `records.py` for your own transitions file."""
