"""The worker's event loop: coordinator connection, rank sockets, reports."""
