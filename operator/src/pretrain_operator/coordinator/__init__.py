"""Who trains together: the coordinator, a state machine with sockets around it."""
