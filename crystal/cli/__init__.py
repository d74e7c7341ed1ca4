"""The `crystal` command, a file a group: parses, calls a function of a room, prints text, a table or JSON."""
