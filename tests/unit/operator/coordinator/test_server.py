"""The server around the coordinator, with real WebSockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable

import aiohttp
import pytest
from aiohttp import ClientWebSocketResponse, web
from aiohttp.test_utils import TestClient, TestServer

from pretrain_api.bounds import MAX_NUMBER
from pretrain_api.messages import protocol, reports
from pretrain_api.messages.protocol import COORDINATOR_MESSAGE, CoordinatorMessage, Heartbeat, Hello, Report, StoreReady
from pretrain_operator.coordinator.authentication import AuthenticationFailure, Caller
from pretrain_operator.coordinator.server import AgentServer, CoordinatorChannel
from pretrain_operator.facts.fact import CoordinatorFact, GenerationAnnounced, GenerationEnded, Reported
from support.coordinator import JOB, a_step, a_want

Client = TestClient[web.Request, web.Application]


class Agent:
    """A client that follows the agents' protocol."""

    def __init__(self, socket: ClientWebSocketResponse) -> None:
        self.socket = socket

    async def say(self, message: protocol.AgentMessage) -> None:
        await self.socket.send_str(message.to_json())

    async def hears(self, kind: str) -> CoordinatorMessage:
        async with asyncio.timeout(10):
            while True:
                message = COORDINATOR_MESSAGE.validate_json(await self.socket.receive_str())
                if message.kind == kind:
                    return message

    async def hangs_up(self) -> None:
        async with asyncio.timeout(10):
            while not self.socket.closed:
                await self.socket.receive()


async def authenticate(request: web.Request, uid: str) -> Caller | AuthenticationFailure:
    """Accept callers without a token; `SLOT/ATTEMPT` is a valid token, a number the status of a rejection."""
    token = request.headers.get("X-Token")
    if token is None:
        return Caller(None, None)
    if "/" in token:
        slot, attempt = token.split("/")
        return Caller(int(slot), int(attempt))
    return AuthenticationFailure(int(token), "no")


@pytest.fixture
def refusals() -> list[str]:
    """Reasons of the refused messages."""
    return []


@pytest.fixture
def server(refusals: list[str]) -> AgentServer:
    return AgentServer(authenticate, refused=refusals.append)


@pytest.fixture
async def client(server: AgentServer) -> AsyncIterator[Client]:
    async with TestClient(TestServer(server.application())) as client:
        yield client


async def connect(client: Client, slot: int, token: str | None = None, **changes: object) -> Agent:
    headers = {"X-Token": token} if token else {}
    agent = Agent(await client.ws_connect(f"/v1/jobs/{JOB}/agents", headers=headers))
    hello = Hello(job_uid=JOB, slot=slot, attempt=0, agent_id=f"a{slot}", host="127.0.0.1")
    await agent.say(hello.model_copy(update=changes))
    return agent


def a_channel(server: AgentServer, workers: int) -> CoordinatorChannel:
    channel = server.open(JOB, epoch=7, highest_number=0)
    channel.set_want(a_want(frozenset((slot, 0) for slot in range(workers)), replicas=workers))
    return channel


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def test_two_agents_become_a_generation_over_real_sockets(server: AgentServer, client: Client) -> None:
    facts: list[CoordinatorFact] = []
    channel = a_channel(server, 2)
    channel.on_facts(facts.extend)
    first, second = await connect(client, 0), await connect(client, 1)

    asked = await first.hears("host_store")
    assert isinstance(asked, protocol.HostStore)
    await first.say(StoreReady(number=asked.number, port=4242))
    formed = [await agent.hears("generation") for agent in (first, second)]

    assert formed[0] == formed[1]
    assert isinstance(formed[0], protocol.Formed)
    assert (formed[0].epoch, formed[0].generation.store_port) == (7, 4242)
    assert channel.view().current == formed[0].generation
    assert [type(fact) for fact in facts] == [GenerationAnnounced]


async def test_a_report_is_acknowledged_after_the_facts_were_taken(server: AgentServer, client: Client) -> None:
    taken: list[CoordinatorFact] = []
    channel = a_channel(server, 1)
    channel.on_facts(taken.extend)
    agent = await connect(client, 0)
    await agent.hears("host_store")
    await agent.say(StoreReady(number=1, port=1))
    await agent.hears("generation")
    for seq in range(1, 21):
        await agent.say(Report(seq=seq, generation=1, time=1.0, body=a_step(seq)))

    acked = await agent.hears("acked")

    assert isinstance(acked, protocol.Acked)
    steps = [fact for fact in taken if isinstance(fact, Reported) and isinstance(fact.body, reports.StepDone)]
    assert len(steps) >= acked.seq


async def test_an_unknown_kind_is_answered_with_an_error_and_the_connection_stays(
    server: AgentServer, client: Client
) -> None:
    a_channel(server, 1)
    agent = await connect(client, 0)
    await agent.hears("joined")

    await agent.socket.send_str('{"kind": "dance"}')
    error = await agent.hears("error")
    await agent.socket.send_str("not json")
    await agent.hears("error")
    await agent.say(Heartbeat())

    assert isinstance(error, protocol.Error)
    assert "dance" in error.message
    assert not agent.socket.closed


async def formed(server: AgentServer, client: Client, facts: list[CoordinatorFact]) -> tuple[Agent, Agent]:
    """Return the two members of a running generation, each with its token."""
    channel = a_channel(server, 2)
    channel.on_facts(facts.extend)
    first, second = await connect(client, 0, "0/0"), await connect(client, 1, "1/0")
    await first.hears("host_store")
    await first.say(StoreReady(number=1, port=1))
    for agent in (first, second):
        await agent.hears("generation")
    return first, second


@pytest.mark.parametrize(
    ("field", "value"),
    [("tokens", "9" * 400), ("tokens", "9" * 5000), ("step", "-1"), ("seconds", "1e30")],
    ids=["400 digits", "5000 digits", "below zero", "long"],
)
async def test_a_report_out_of_bounds_is_refused_and_its_worker_has_failed(
    server: AgentServer, client: Client, refusals: list[str], field: str, value: str
) -> None:
    facts: list[CoordinatorFact] = []
    _, liar = await formed(server, client, facts)
    report = Report(seq=1, generation=1, time=1.0, body=a_step(1)).model_dump(mode="json", by_alias=True)
    report["body"][field] = "VALUE"

    await liar.socket.send_str(json.dumps(report).replace('"VALUE"', value))
    error = await liar.hears("error")
    await liar.hangs_up()

    assert isinstance(error, protocol.Error)
    assert field in error.message or "out of range" in error.message
    (ended,) = (fact for fact in facts if isinstance(fact, GenerationEnded))
    assert (ended.cause, ended.slot) == ("RankFailed", 1)
    assert error.message in ended.message
    assert not any(isinstance(fact, Reported) for fact in facts)
    assert refusals == ["OutOfBounds"]


async def test_a_worker_that_failed_by_its_message_is_shut_down_whenever_it_returns(
    server: AgentServer, client: Client
) -> None:
    facts: list[CoordinatorFact] = []
    _, liar = await formed(server, client, facts)
    await liar.socket.send_str('{"kind": "heartbeat", "step": 9223372036854775808}')
    await liar.hangs_up()

    back = await connect(client, 1, "1/0", agent_id="another")

    shutdown = await back.hears("shutdown")
    assert isinstance(shutdown, protocol.Shutdown)
    assert shutdown.reason == "removed"
    assert "step" in shutdown.message


async def test_a_hello_with_an_absurd_number_of_processes_is_refused(
    server: AgentServer, client: Client, refusals: list[str]
) -> None:
    channel = a_channel(server, 1)
    socket = await client.ws_connect(f"/v1/jobs/{JOB}/agents", headers={"X-Token": "0/0"})
    hello = Hello(job_uid=JOB, slot=0, attempt=0, agent_id="a", host="h").model_copy(update={"processes": 10**12})
    await socket.send_str(hello.to_json())

    error = await Agent(socket).hears("error")

    assert isinstance(error, protocol.Error)
    assert "processes" in error.message
    assert channel.view().agents == ()
    assert refusals == ["OutOfBounds"]


async def test_a_hello_with_another_number_of_processes_than_the_job_s_is_refused(
    server: AgentServer, client: Client, refusals: list[str]
) -> None:
    channel = server.open(JOB, epoch=7, highest_number=0)
    channel.set_want(a_want(frozenset({(0, 0), (1, 0)}), replicas=2, processes=8))
    right, wrong = await connect(client, 0, processes=8), await connect(client, 1, processes=4)

    shutdown = await wrong.hears("shutdown")
    await right.hears("joined")

    assert isinstance(shutdown, protocol.Shutdown)
    assert "hello.processes" in shutdown.message
    assert [agent.slot for agent in channel.view().agents] == [0]
    assert refusals == ["WrongProcesses"]


async def test_a_running_worker_keeps_its_number_of_processes_when_the_job_s_changes(
    server: AgentServer, client: Client
) -> None:
    members = (protocol.Member(rank=0, agent_id="a0", slot=0, attempt=0, host="h", processes=4),)
    running = protocol.Generation(
        number=3, job_uid=JOB, members=members, store_host="h", store_port=1, reason="Started"
    )
    channel = server.open(JOB, epoch=7, highest_number=3)
    channel.set_want(a_want(frozenset({(0, 0)}), replicas=1, processes=8))

    await (await connect(client, 0, processes=4, generation=running)).hears("joined")


async def test_what_a_newer_peer_may_say_is_counted_and_harms_nobody(
    server: AgentServer, client: Client, refusals: list[str]
) -> None:
    facts: list[CoordinatorFact] = []
    _, newer = await formed(server, client, facts)

    for text in ('{"kind": "dance"}', "not json", '{"kind": "heartbeat", "step": null}'):
        await newer.socket.send_str(text)
        await newer.hears("error")

    assert refusals == ["UnknownKind", "Malformed", "Invalid"]
    assert not any(isinstance(fact, GenerationEnded) for fact in facts)


async def test_the_highest_number_that_a_worker_may_report_leaves_numbers_for_the_job(
    server: AgentServer, client: Client
) -> None:
    a_channel(server, 1)
    agent = await connect(client, 0, highest_number=MAX_NUMBER)

    asked = await agent.hears("host_store")

    assert isinstance(asked, protocol.HostStore)
    assert asked.number < MAX_NUMBER


async def test_unknown_fields_are_ignored(server: AgentServer, client: Client) -> None:
    a_channel(server, 1)
    socket = await client.ws_connect(f"/v1/jobs/{JOB}/agents")
    hello = Hello(job_uid=JOB, slot=0, attempt=0, agent_id="a", host="h").to_json()
    await socket.send_str(hello[:-1] + ', "fromTheFuture": 1}')

    await Agent(socket).hears("joined")


async def test_another_protocol_version_is_answered_with_an_error_and_closed(
    server: AgentServer, client: Client
) -> None:
    a_channel(server, 1)
    agent = await connect(client, 0, version=99)

    await agent.hears("error")
    await agent.hangs_up()


async def test_whoever_is_not_authenticated_or_at_the_wrong_place_is_refused(
    server: AgentServer, client: Client
) -> None:
    a_channel(server, 1)

    for status in ("401", "403", "503"):
        with pytest.raises(aiohttp.WSServerHandshakeError, match=status):
            await client.ws_connect(f"/v1/jobs/{JOB}/agents", headers={"X-Token": status})
    with pytest.raises(aiohttp.WSServerHandshakeError, match="404"):
        await client.ws_connect("/v1/jobs/other/agents")
    assert (await client.get("/healthz")).status == 200


async def test_who_is_refused_does_not_learn_which_jobs_there_are(server: AgentServer, client: Client) -> None:
    a_channel(server, 1)

    answers = [await client.get(f"/v1/jobs/{uid}/agents", headers={"X-Token": "401"}) for uid in (JOB, "other")]

    assert [(answer.status, await answer.text()) for answer in answers] == [(401, "no")] * 2


async def test_a_worker_is_taken_by_its_own_token(server: AgentServer, client: Client) -> None:
    a_channel(server, 2)

    await (await connect(client, 1, token="1/0")).hears("joined")


@pytest.mark.parametrize("token", ["0/0", "1/1"])
async def test_a_hello_in_the_name_of_another_worker_is_answered_with_an_error_and_changes_nothing(
    server: AgentServer, client: Client, token: str
) -> None:
    channel = a_channel(server, 2)
    impostor = await connect(client, 1, token=token)

    error = await impostor.hears("error")
    await impostor.hangs_up()

    assert isinstance(error, protocol.Error)
    assert "slot 1" in error.message
    assert channel.view().agents == ()


async def test_a_lost_connection_is_seen_in_the_view(server: AgentServer, client: Client) -> None:
    channel = a_channel(server, 1)
    changes: list[bool] = []
    channel.on_change(lambda: changes.append(any(agent.connected for agent in channel.view().agents)))
    agent = await connect(client, 0)
    await agent.hears("joined")

    await agent.socket.close()
    await until(lambda: bool(changes) and not changes[-1])

    assert True in changes


async def test_a_step_calls_for_no_look_and_what_else_is_said_does(server: AgentServer, client: Client) -> None:
    channel = a_channel(server, 1)
    looks: list[str] = []
    channel.on_facts(lambda facts: looks.extend(fact.body.kind for fact in facts if isinstance(fact, Reported)))
    agent = await connect(client, 0)
    await agent.hears("host_store")
    await agent.say(StoreReady(number=1, port=1))
    await agent.hears("generation")
    channel.on_change(lambda: looks.append("look"))

    for seq, body in enumerate((a_step(1), a_step(2), reports.SaveFailed(step=2, message="full")), 1):
        await agent.say(Report(seq=seq, generation=1, time=0.0, body=body))
    await until(lambda: "look" in looks)

    assert looks == ["step", "step", "save_failed", "look"]


async def test_an_agent_that_does_not_read_delays_no_other_agent_and_is_disconnected(
    server: AgentServer, client: Client
) -> None:
    channel = a_channel(server, 2)
    deaf, good = await connect(client, 0), await connect(client, 1)
    await good.hears("joined")
    deaf.socket._response.connection.transport.pause_reading()  # type: ignore[union-attr]
    noise = '{"kind": "' + "x" * 60_000 + '"}'

    async def shout() -> None:
        for _ in range(3_000):
            await deaf.socket.send_str(noise)

    shouting = asyncio.create_task(shout())
    await until(lambda: not all(agent.connected for agent in channel.view().agents))
    await good.socket.send_str('{"kind": "dance"}')
    await good.hears("error")
    shouting.cancel()

    assert [agent.slot for agent in channel.view().agents if agent.connected] == [1]


async def test_the_end_of_a_job_reaches_every_agent(server: AgentServer, client: Client) -> None:
    channel = a_channel(server, 2)
    agents = [await connect(client, slot) for slot in range(2)]
    for agent in agents:
        await agent.hears("joined")

    await channel.end("succeeded", "all steps done")

    for agent in agents:
        shutdown = await agent.hears("shutdown")
        assert isinstance(shutdown, protocol.Shutdown)
        assert (shutdown.reason, shutdown.message) == ("succeeded", "all steps done")


async def test_a_closed_channel_lets_its_agents_go_and_is_gone(server: AgentServer, client: Client) -> None:
    channel = a_channel(server, 1)
    agent = await connect(client, 0)
    await agent.hears("joined")

    channel.close()
    await agent.hangs_up()

    with pytest.raises(aiohttp.WSServerHandshakeError, match="404"):
        await client.ws_connect(f"/v1/jobs/{JOB}/agents")


async def test_a_silent_member_is_found_by_the_clock_alone(server: AgentServer, client: Client) -> None:
    channel = a_channel(server, 2)
    causes: list[str] = []
    channel.on_facts(lambda facts: causes.extend(fact.cause for fact in facts if isinstance(fact, GenerationEnded)))
    talker, mute = await connect(client, 0), await connect(client, 1)
    await talker.hears("host_store")
    await talker.say(StoreReady(number=1, port=1))
    await mute.hears("generation")

    async def talk() -> None:
        while True:
            await talker.say(Heartbeat(generation=1))
            await asyncio.sleep(0.1)

    talking = asyncio.create_task(talk())
    await until(lambda: causes == ["WorkerSilent"])
    talking.cancel()


async def test_a_want_given_inside_a_callback_comes_after_what_called_it(server: AgentServer, client: Client) -> None:
    channel = a_channel(server, 1)
    seen: list[int] = []

    def changed() -> None:
        seen.append(len(seen))
        if len(seen) == 1:
            channel.set_want(a_want(frozenset({(0, 0), (1, 0)}), replicas=2))

    channel.on_change(changed)
    agent = await connect(client, 0)
    await agent.hears("joined")

    assert len(seen) >= 2


async def test_an_agent_of_a_job_that_is_over_is_told_so_without_a_channel(server: AgentServer, client: Client) -> None:
    a_channel(server, 1).close()
    server.dismiss(JOB, protocol.Shutdown(epoch=7, reason="succeeded", message="100 steps are done"))

    agent = await connect(client, 0)

    assert await agent.hears("shutdown") == protocol.Shutdown(epoch=7, reason="succeeded", message="100 steps are done")
    assert server.connections == 0


async def test_of_a_job_that_is_deleted_nothing_is_known(server: AgentServer, client: Client) -> None:
    server.dismiss(JOB, protocol.Shutdown(reason="succeeded"))
    server.forget(JOB)

    with pytest.raises(aiohttp.WSServerHandshakeError, match="404"):
        await connect(client, 0)


async def test_the_connected_agents_of_all_jobs_are_counted(server: AgentServer, client: Client) -> None:
    a_channel(server, 2)
    agents = [await connect(client, 0), await connect(client, 1)]
    for agent in agents:
        await agent.hears("joined")
    assert server.connections == 2

    await agents[0].socket.close()

    await until(lambda: server.connections == 1)
