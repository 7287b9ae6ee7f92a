"""The engine in a child process: the host in the child, the client in the caller, and their protocol."""
