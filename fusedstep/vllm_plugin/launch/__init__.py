"""The process of a command: options, wiring, the server."""
