from __future__ import annotations

from collections.abc import Callable

from common.broker import Broker
from common.cards import WorkerCard
from common.limits import Limits, by_model

CardFn = Callable[[str], WorkerCard]


def test_the_largest_memory_and_all_loras_count(card: CardFn) -> None:
    small = card("w1").model_copy(update={"max_pixels": {"simulated": 100}, "loras": ["ink"], "capacity": 2})
    large = card("w2").model_copy(update={"max_pixels": {"simulated": 400}, "loras": ["clay"]})
    assert by_model([small, large]) == {"simulated": Limits(3, 400, frozenset({"ink", "clay"}))}


def test_what_not_every_worker_tells_is_not_known(card: CardFn) -> None:
    told = card("w1").model_copy(update={"max_pixels": {"simulated": 100, "other": 5}})
    assert by_model([told, card("w2")])["simulated"] == Limits(2, None, None)
    assert by_model([]) == {}


def test_an_empty_folder_is_known_and_one_nobody_has_looked_into_is_not(card: CardFn) -> None:
    bare, ink = (card(name).model_copy(update={"loras": loras}) for name, loras in (("w1", []), ("w2", ["ink"])))
    assert by_model([bare])["simulated"].loras == frozenset()
    assert by_model([bare, ink])["simulated"].loras == {"ink"}
    assert by_model([ink, card("w3")])["simulated"].loras is None


def test_the_broker_reads_it_from_the_cards(broker: Broker, card: CardFn) -> None:
    broker.beat(card("w1").model_copy(update={"max_pixels": {"simulated": 100}}), [], 60)
    assert broker.limits("simulated") == Limits(1, 100, None)
    assert broker.limits("nope") == Limits()
