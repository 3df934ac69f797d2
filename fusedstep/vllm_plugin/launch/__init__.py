"""What runs in the process of a command: options, wiring, the server."""
