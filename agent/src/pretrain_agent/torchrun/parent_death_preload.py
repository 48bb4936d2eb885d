"""First preload of the fork server: makes it die with the agent.

The only module that acts on import, since a fork server runs no other code of ours. Only the fork server and the ranks
forked from it may import it.
"""

from __future__ import annotations

import os

from pretrain_agent.system.processes import AGENT_PID_VARIABLE, die_with_parent

die_with_parent(int(os.environ[AGENT_PID_VARIABLE]))

SERVER_PID = os.getpid()
"""Process id of the fork server, the parent of the ranks that inherit this value."""
