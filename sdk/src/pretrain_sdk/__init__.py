"""SDK for training programs: the link to the agent, and folders that vanish with their process.

A program calls `connect` once and then `AgentLink.report`, `commands` and `wait_command`; without an agent it gets an
`UnattendedLink`, so the same program runs alone. Importing this package imports neither torch nor aiohttp.
"""

from pretrain_sdk.rank_link import AgentLink, SocketLink, UnattendedLink, connect
from pretrain_sdk.scratch import Scratch

__all__ = ["AgentLink", "Scratch", "SocketLink", "UnattendedLink", "connect"]
