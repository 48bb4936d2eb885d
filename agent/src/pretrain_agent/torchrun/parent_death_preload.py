"""The fork server's first preload: makes it die with the agent.

Unlike any other module it acts when it is imported, for that is the only moment at which a fork server runs code of
ours. Nothing but the fork server, and the ranks forked from it, may import it.
"""

from __future__ import annotations

import os

from pretrain_agent.system.parent_death import AGENT_PID_VARIABLE, die_with_parent

die_with_parent(int(os.environ[AGENT_PID_VARIABLE]))

SERVER_PID = os.getpid()
"""The fork server's process id. Ranks find it here, in the memory they were forked with: it is their parent's."""
