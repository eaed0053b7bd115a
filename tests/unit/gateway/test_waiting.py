from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from common.broker import Broker
from common.errors import RedisUnavailable
from common.records import Event
from gateway import waiting
from gateway.waiting import FINAL, Hub, Listener
from tests.servers import eventually
from tests.unit.gateway.fake_worker import FakeWorker


class Channel:
    """Stands in for Broker.events: every subscription yields what is put while it stands."""

    def __init__(self) -> None:
        self.standing: dict[bool, queue.Queue[Event | Exception]] = {}  # by ends_only
        self.subscriptions = 0

    def events(self, stop: Callable[[], bool], *, ends_only: bool = False) -> Iterator[Event | None]:
        self.subscriptions += 1
        mine = self.standing[ends_only] = queue.Queue()
        yield None
        while not stop():
            try:
                event = mine.get(timeout=0.02)
            except queue.Empty:
                continue
            if isinstance(event, Exception):
                raise event
            yield event
        del self.standing[ends_only]

    def put(self, task_id: str, name: str, step: int = 0, steps: int = 0) -> None:
        for ends_only, events in list(self.standing.items()):
            if name in FINAL or not ends_only:
                events.put(Event(task_id, name, step, steps))


@pytest.fixture
def channel() -> Channel:
    return Channel()


@pytest.fixture
def hub(channel: Channel) -> Iterator[Hub]:
    hub = Hub(channel.events)
    yield hub
    hub.close()


def both_stand(channel: Channel, listener: Listener) -> None:
    eventually(lambda: len(channel.standing) == 2)
    while listener.wait(0.05) != "timeout":
        pass


def test_nothing_is_subscribed_before_somebody_listens(hub: Hub, channel: Channel) -> None:
    time.sleep(0.05)
    assert channel.subscriptions == 0
    with hub.listen("a"):
        eventually(lambda: channel.subscriptions == 1)
    with hub.listen("b"), hub.listen("b"):
        pass
    assert channel.subscriptions == 1


def test_a_subscription_that_stands_makes_everybody_look(hub: Hub) -> None:
    with hub.listen("a") as listener:
        assert listener.wait(5) == "look"
        assert listener.wait(0.01) == "timeout"


def test_only_the_end_of_its_own_task_wakes_a_waiter(hub: Hub, channel: Channel) -> None:
    with hub.listen("a") as listener:
        assert listener.wait(5) == "look"
        for task_id, name in (("b", "succeeded"), ("a", "running"), ("a", "progress"), ("a", "queued")):
            channel.put(task_id, name)
        assert listener.wait(0.1) == "timeout"
        channel.put("a", "failed")
        assert listener.wait(5) == "final"


@pytest.mark.parametrize("name", ["succeeded", "failed", "canceled", "expired"])
def test_every_final_state_is_an_end(hub: Hub, channel: Channel, name: str) -> None:
    with hub.listen("a") as listener:
        assert listener.wait(5) == "look"
        channel.put("a", name)
        assert listener.wait(5) == "final"


def test_a_follower_hears_every_step_and_change(hub: Hub, channel: Channel) -> None:
    with hub.listen("a", every_step=True) as listener:
        both_stand(channel, listener)
        channel.put("a", "running", 0, 8)
        assert listener.wait(5) == "changed"
        channel.put("a", "progress", 3, 8)
        assert listener.wait(5) == "progress"
        assert (listener.step, listener.steps) == (3, 8)


def test_a_slow_follower_hears_the_last_step_and_never_misses_a_change(hub: Hub, channel: Channel) -> None:
    with hub.listen("a", every_step=True) as listener:
        both_stand(channel, listener)
        channel.put("a", "running")
        for step in range(1, 6):
            channel.put("a", "progress", step, 8)
        eventually(lambda: listener.step == 5)
        assert listener.wait(5) == "changed"
        channel.put("a", "succeeded")
        channel.put("a", "progress", 8, 8)
        eventually(lambda: listener.step == 8)
        assert listener.wait(5) == "final"


def test_all_listeners_of_a_task_are_woken(hub: Hub, channel: Channel) -> None:
    with hub.listen("a") as one:
        assert one.wait(5) == "look"
        with hub.listen("a") as two:
            channel.put("a", "succeeded")
            assert {one.wait(5), two.wait(5)} == {"final"}


def test_whoever_has_gone_is_forgotten(hub: Hub) -> None:
    with hub.listen("a"), hub.listen("a"):
        pass
    with pytest.raises(KeyError), hub.listen("b"):
        raise KeyError
    assert (hub._topics, hub._count) == ({}, 0)


def test_one_thread_serves_all(hub: Hub, channel: Channel) -> None:
    listening = [hub.listen(str(number)) for number in range(500)]
    listeners = [one.__enter__() for one in listening]
    assert (len(hub._threads), channel.subscriptions) == (1, 1)
    for number in range(500):
        channel.put(str(number), "succeeded")
    assert {listener.wait(5) for listener in listeners} <= {"look", "final"}
    for one in listening:
        one.__exit__(None, None, None)


def test_a_failing_subscription_is_begun_again(hub: Hub, channel: Channel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "RESTART_S", 0.01)
    with hub.listen("a") as listener:
        assert listener.wait(5) == "look"
        channel.standing[True].put(ValueError("not an event"))
        assert listener.wait(5) == "look"
        assert channel.subscriptions == 2


def test_closing_lets_everybody_answer_and_ends_the_thread(hub: Hub) -> None:
    with hub.listen("a") as listener:
        assert listener.wait(5) == "look"
        hub.close()
        assert listener.wait(5) == "look"
        eventually(lambda: not hub._threads)


def test_steps_are_subscribed_to_only_while_somebody_follows(hub: Hub, channel: Channel) -> None:
    with hub.listen("a"):
        eventually(lambda: list(channel.standing) == [True])
        with hub.listen("a", every_step=True), hub.listen("b", every_step=True):
            eventually(lambda: set(channel.standing) == {True, False})
        eventually(lambda: set(channel.standing) == {True} == set(hub._threads))
        with hub.listen("a", every_step=True) as follower:
            both_stand(channel, follower)
            channel.put("a", "progress", 1, 2)
            assert follower.wait(5) == "progress"


def test_followers_come_and_go_without_losing_their_steps(hub: Hub, channel: Channel) -> None:
    for number in range(200):
        with hub.listen("a", every_step=True) as follower:
            if number % 10 == 0:
                both_stand(channel, follower)
                channel.put("a", "progress", number, 200)
                assert follower.wait(5) == "progress"
    eventually(lambda: set(hub._threads) == {True})


def test_many_listeners_read_less_often_and_spread_out(hub: Hub) -> None:
    assert 6 <= hub.safety_net_s() <= 10
    hub._count = 10_000
    assert 60 <= hub.safety_net_s() <= 100
    hub._count = 0


def test_a_crowd_that_heard_the_same_takes_turns(hub: Hub) -> None:
    with ExitStack() as stack:
        few = stack.enter_context(hub.listen("a"))
        signals: tuple[waiting.Signal, ...] = ("timeout", "look", "progress", "changed", "final")
        assert [hub.turn_s(few, heard) for heard in signals] == [0.0] * 5
        several = [stack.enter_context(hub.listen("b")) for _ in range(500)]
        many = several[0]
        assert max(hub.turn_s(few, "look") for _ in range(200)) > 0.3
        assert hub.turn_s(few, "final") == hub.turn_s(many, "timeout") == hub.turn_s(many, "progress") == 0
        turns = [hub.turn_s(many, "final") for _ in range(200)]
        assert 0.6 < max(turns) <= 1.0 and min(turns) < 0.2


def test_one_look_serves_all_who_have_heard_the_same(hub: Hub, channel: Channel) -> None:
    looks: list[int] = []

    def look() -> int:
        time.sleep(0.05)
        looks.append(len(looks))
        return looks[-1]

    with hub.listen("a") as one, hub.listen("a") as two, hub.listen("b") as other, ThreadPoolExecutor() as pool:
        assert one.wait(5) == "look"
        assert [*pool.map(lambda _: one.topic.look("x", look), range(8)), two.topic.look("x", look)] == [0] * 9
        channel.put("a", "succeeded")
        assert (one.wait(5), two.wait(5)) == ("final", "final")
        assert [one.topic.look("x", look), two.topic.look("x", look)] == [1, 1]
        assert other.topic.look("x", look) == 2


def test_a_look_that_something_was_heard_during_serves_only_who_asked_before(hub: Hub, channel: Channel) -> None:
    with hub.listen("a") as listener:
        assert listener.wait(5) == "look"

        def overtaken() -> str:
            channel.put("a", "failed")
            assert listener.wait(5) == "final"
            return "before"

        assert listener.topic.look("x", overtaken) == "before"
        assert listener.topic.look("x", lambda: "after") == "after"


def test_a_look_serves_for_a_moment_or_for_as_long_as_silence_is_trusted(hub: Hub) -> None:
    with hub.listen("a") as listener:
        assert listener.wait(5) == "look"
        assert listener.topic.look("x", lambda: 1) == 1
        time.sleep(waiting.FRESH_S + 0.05)
        assert listener.topic.look("x", lambda: 2, fresh_s=60) == 1
        assert listener.topic.look("x", lambda: 2) == 2


def test_a_failed_look_is_everybodys_and_is_tried_again(hub: Hub) -> None:
    tries: list[None] = []

    def fail() -> None:
        tries.append(None)
        raise RedisUnavailable("away")

    with hub.listen("a") as listener:
        assert listener.wait(5) == "look"
        for _ in range(3):
            with pytest.raises(RedisUnavailable, match="away"):
                listener.topic.look("x", fail)
        assert len(tries) == 1
        time.sleep(waiting.FRESH_S + 0.05)
        assert listener.topic.look("x", lambda: "back", fresh_s=60) == "back"


def test_a_follower_who_rests_lets_steps_go_by_but_no_change(hub: Hub, channel: Channel) -> None:
    with hub.listen("a", every_step=True) as listener:
        both_stand(channel, listener)
        timer = threading.Timer(0.1, channel.put, ("a", "progress", 3, 8))
        timer.start()
        began = time.monotonic()
        listener.rest(0.4)
        assert time.monotonic() - began > 0.35
        assert (listener.wait(0), listener.step) == ("progress", 3)
        timer = threading.Timer(0.1, channel.put, ("a", "running"))
        timer.start()
        began = time.monotonic()
        listener.rest(5)
        assert time.monotonic() - began < 2
        assert listener.wait(0) == "changed"


def test_the_more_follow_the_fewer_steps_is_each_told(hub: Hub) -> None:
    hub._followers = 2_000
    gaps = [hub.step_gap_s() for _ in range(200)]
    assert min(gaps) >= 1 and max(gaps) <= 3 and max(gaps) - min(gaps) > 1
    hub._followers = 0


def test_whoever_overhears_is_told_of_every_task_while_it_stays(hub: Hub, channel: Channel) -> None:
    heard: list[str | None] = []
    hub.overhear(heard.append)
    assert not hub.hears_all
    hub.stay(0.3)
    eventually(lambda: hub.hears_all)
    for name in ("running", "progress", "succeeded"):
        channel.put("a", name)
    eventually(lambda: heard[-3:] == ["a", "a", "a"])
    eventually(lambda: not hub.hears_all)
    assert heard[-1] is None and set(channel.standing) == set()


def test_a_subscription_that_fails_hears_nothing_until_it_stands_again(
    hub: Hub, channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "RESTART_S", 0.3)
    hub.stay(60)
    eventually(lambda: hub.hears_all)
    channel.standing[False].put(ValueError("not an event"))
    eventually(lambda: not hub.hears_all)
    eventually(lambda: hub.hears_all)


def test_redis_keeps_ends_and_steps_apart(broker: Broker, submit: Callable[..., str], worker: FakeWorker) -> None:
    hub = Hub(broker.events)
    task_id = submit(steps=4)
    with hub.listen(task_id) as waiter, hub.listen(task_id, every_step=True) as follower:
        assert (waiter.wait(5), follower.wait(5)) == ("look", "look")
        eventually(lambda: len(hub._threads) == 2)
        while follower.wait(0.5) != "timeout":  # both subscriptions stand
            pass
        waiter.wait(0)
        (task,) = worker.take()
        assert follower.wait(5) == "changed"
        worker.step(task, 3)
        assert (follower.wait(5), follower.step, follower.steps) == ("progress", 3, 4)
        assert waiter.wait(0.2) == "timeout"
        worker.succeed(task)
        assert (waiter.wait(5), follower.wait(5)) == ("final", "final")
    hub.close()
