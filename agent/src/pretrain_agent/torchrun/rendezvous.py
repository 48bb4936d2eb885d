"""torchrun's rendezvous as the coordinator decides it: backend `pretrain` in entry point group `torchrun.handlers`."""

from __future__ import annotations

from torch.distributed import HashStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.elastic.rendezvous.api import (
    RendezvousGracefulExitError,
    RendezvousHandler,
    RendezvousHandlerCreator,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
)

from pretrain_agent.torchrun.mailbox import Assignment, Mailbox, MailboxClosed

BACKEND = "pretrain"


def entry() -> RendezvousHandlerCreator:
    """What torchrun loads: the function that makes a handler."""
    return create_handler


def create_handler(params: RendezvousParameters) -> RendezvousHandler:
    """A handler fed by the mailbox in `params`; raises ValueError outside of pretrain-agent."""
    mailbox = params.get("mailbox")
    if not isinstance(mailbox, Mailbox):
        raise ValueError("the rendezvous backend `pretrain` works inside pretrain-agent only: start that, not torchrun")
    return MailboxRendezvous(mailbox, params.run_id)


class MailboxRendezvous(RendezvousHandler):
    """Hands torchrun the generations that arrive in the mailbox."""

    def __init__(self, mailbox: Mailbox, run_id: str) -> None:
        self._mailbox = mailbox
        self._run_id = run_id
        self.assignment: Assignment | None = None
        """The one that torchrun works on."""

    def get_backend(self) -> str:
        """The backend's name."""
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        """Ranks are clients of the store that the rank-0 agent hosts for this generation."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for the next generation with this agent in it.

        Raises RendezvousGracefulExitError on shutdown.
        """
        try:
            self.assignment = self._mailbox.take()
        except MailboxClosed as closed:
            raise RendezvousGracefulExitError("the agent shuts down") from closed
        generation = self.assignment.generation
        # torchrun's agents agree over this store on what the coordinator has decided already. They get an empty one of
        # their own: a connection to rank 0's store could block until a timeout if that agent is gone by now.
        return RendezvousInfo(
            HashStore(),
            self.assignment.member.rank,
            len(generation.members),
            RendezvousStoreInfo(generation.store_host, generation.store_port),
        )

    def num_nodes_waiting(self) -> int:
        """1 when the generation that torchrun works on is over, else 0."""
        current = self.assignment is not None and self._mailbox.is_current(self.assignment.generation.number)
        return 0 if current else 1

    def is_closed(self) -> bool:
        """Whether the agent shuts down."""
        return self._mailbox.closed

    def set_closed(self) -> None:
        """Only the coordinator ends a rendezvous."""

    def get_run_id(self) -> str:
        """The job's uid."""
        return self._run_id

    def shutdown(self) -> bool:
        """Nothing is open."""
        return True


class StoreHost:
    """The TCPStores of the generations in which this agent has rank 0: one each, never shared.

    A store that outlives its generation would lead new ranks to addresses of dead peers.
    """

    def __init__(self, host: str) -> None:
        self._host = host
        self._stores: dict[int, TCPStore] = {}

    def listen(self, number: int) -> int:
        """Listen for this generation and return the port; the same one when asked again."""
        if number not in self._stores:
            self._stores[number] = TCPStore(self._host, 0, is_master=True, wait_for_workers=False)
        return self._stores[number].port

    def drop_below(self, number: int) -> None:
        """Stop the stores of the generations before `number`."""
        for old in [held for held in self._stores if held < number]:
            del self._stores[old]
