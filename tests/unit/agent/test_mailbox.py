import os
import select
import threading

import pytest

from pretrain_agent.torchrun.mailbox import Assignment, Mailbox, MailboxClosed
from support.worker.agent import a_generation, a_member


def an_assignment(number: int, rank: int = 0) -> Assignment:
    members = (a_member(0, processes=2), a_member(1, processes=3), a_member(2, processes=1))
    return Assignment(a_generation(number, members), members[rank], "/socket")


def test_a_generation_is_taken_once() -> None:
    mailbox = Mailbox()
    mailbox.announce(an_assignment(7))
    assert mailbox.take().generation.number == 7
    taken: list[int] = []
    thread = threading.Thread(target=lambda: taken.append(mailbox.take().generation.number))
    thread.start()

    mailbox.announce(an_assignment(7))
    mailbox.announce(an_assignment(8))
    thread.join(10)

    assert taken == [8]


def test_only_the_newest_generation_is_taken() -> None:
    mailbox = Mailbox()
    mailbox.announce(an_assignment(1))
    mailbox.announce(an_assignment(2))

    assert mailbox.take().generation.number == 2


def test_a_withdrawn_generation_is_not_current() -> None:
    mailbox = Mailbox()
    mailbox.announce(an_assignment(1))
    mailbox.take()
    assert mailbox.is_current(1)

    mailbox.withdraw()

    assert not mailbox.is_current(1)


def test_a_newer_announcement_makes_the_older_one_not_current() -> None:
    mailbox = Mailbox()
    mailbox.announce(an_assignment(1))

    mailbox.announce(an_assignment(2))

    assert not mailbox.is_current(1)
    assert mailbox.is_current(2)


def test_closing_wakes_whoever_waits() -> None:
    mailbox = Mailbox()
    closed = threading.Event()

    def wait() -> None:
        with pytest.raises(MailboxClosed):
            mailbox.take()
        closed.set()

    thread = threading.Thread(target=wait)
    thread.start()
    mailbox.close()

    thread.join(10)
    assert closed.is_set()


def test_every_change_makes_the_wake_descriptor_readable() -> None:
    mailbox = Mailbox()

    def readable() -> bool:
        return bool(select.select([mailbox.wake_fd], [], [], 0)[0])

    for change in (lambda: mailbox.announce(an_assignment(1)), mailbox.withdraw, mailbox.close):
        mailbox.clear_wake()
        assert not readable()
        change()
        assert readable()
    os.close(mailbox.wake_fd)


@pytest.mark.parametrize(("rank", "first"), [(0, 0), (1, 2), (2, 5)])
def test_global_ranks_follow_the_processes_of_the_members_before(rank: int, first: int) -> None:
    assert an_assignment(1, rank).first_rank == first
