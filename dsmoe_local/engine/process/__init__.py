"""The engine in a child process: the host that runs there, the client that callers hold, and the wire."""
