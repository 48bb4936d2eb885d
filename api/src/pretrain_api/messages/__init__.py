"""Messages between operator, agents, ranks and the trainer."""
