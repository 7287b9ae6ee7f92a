"""An engine in a child process: the client in the parent, the host in the child, and their protocol."""
