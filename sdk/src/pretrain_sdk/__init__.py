"""Client library of training programs: the link to the agent, scratch folders, rank logs."""
