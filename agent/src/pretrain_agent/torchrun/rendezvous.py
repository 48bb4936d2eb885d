"""Rendezvous of torchrun, decided by the coordinator: backend `pretrain` of entry point group `torchrun.handlers`."""

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
    """Return the handler factory; torchrun loads this entry point."""
    return create_handler


def create_handler(params: RendezvousParameters) -> RendezvousHandler:
    """Create a handler fed by the mailbox in `params`. Raises ValueError outside of pretrain-agent."""
    mailbox = params.get("mailbox")
    if not isinstance(mailbox, Mailbox):
        raise ValueError("the rendezvous backend `pretrain` works inside pretrain-agent only: start that, not torchrun")
    return MailboxRendezvous(mailbox, params.run_id)


class MailboxRendezvous(RendezvousHandler):
    """Rendezvous handler that passes the mailbox's generations to torchrun."""

    def __init__(self, mailbox: Mailbox, run_id: str) -> None:
        self._mailbox = mailbox
        self._run_id = run_id
        self.assignment: Assignment | None = None
        """Assignment that torchrun runs."""

    def get_backend(self) -> str:
        """Return the backend's name."""
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        """True: ranks use the store that the rank-0 agent hosts for this generation."""
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
        # torchrun's agents would use this store to agree on what the coordinator has decided already. Each gets an
        # empty store of its own: a connection to rank 0's store blocks until a timeout if that agent is gone.
        return RendezvousInfo(
            HashStore(),
            self.assignment.member.rank,
            len(generation.members),
            RendezvousStoreInfo(generation.store_host, generation.store_port),
        )

    def num_nodes_waiting(self) -> int:
        """Return 1 once torchrun's generation is over, else 0."""
        current = self.assignment is not None and self._mailbox.is_current(self.assignment.generation.number)
        return 0 if current else 1

    def is_closed(self) -> bool:
        """Return True once the agent shuts down."""
        return self._mailbox.closed

    def set_closed(self) -> None:
        """Do nothing: only the coordinator ends a rendezvous."""

    def get_run_id(self) -> str:
        """Return the job's uid."""
        return self._run_id

    def shutdown(self) -> bool:
        """Return True: there is nothing to close."""
        return True


class StoreHost:
    """TCPStores of the generations in which this agent has rank 0: one each, never shared.

    A store that outlives its generation would give new ranks the addresses of dead peers.
    """

    def __init__(self, host: str) -> None:
        self._host = host
        self._stores: dict[int, TCPStore] = {}

    def listen(self, number: int) -> int:
        """Listen for this generation and return the port. Idempotent."""
        if number not in self._stores:
            self._stores[number] = TCPStore(self._host, 0, is_master=True, wait_for_workers=False)
        return self._stores[number].port

    def drop_below(self, number: int) -> None:
        """Stop the stores of the generations before `number`."""
        for old in [known for known in self._stores if known < number]:
            del self._stores[old]
