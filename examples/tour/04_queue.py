"""A queue hands things from those who make them to those who use them, each to exactly one. It
lives in the coordinator, so every process can reach it, and with ``maxsize`` a fast
producer waits for slow consumers. Use it when work comes up while others are working; for
the items of a finished list ``each`` is simpler.
"""

import time
from collections import Counter

from taskrun import current, each, result, state, task

orders = state.queue("orders", maxsize=3)

DISHES = ["soup", "salad", "pasta", "cake"] * 3
COOKS = ["ada", "bo"]


@task
def waiter() -> None:
    """Take the orders in; while three are waiting, ``put`` waits as well."""
    for dish in DISHES:
        orders.put(dish)
    for _ in COOKS:
        orders.put(None)  # the end, once for each of them


@task
def cook(name: str = each(COOKS)) -> Counter[str]:
    """Cook until there is nothing more; ``get`` lends this worker to others while it waits."""
    cooked: Counter[str] = Counter()
    while (dish := orders.get()) is not None:
        time.sleep(0.01)
        cooked[dish] += 1
        print(f"{name} has cooked {dish} in process {current().pid}")
    return cooked


@task
def bill(kitchen: list[Counter[str]] = result(cook)) -> None:
    """Every order was cooked, and none twice."""
    total = sum(kitchen, Counter[str]())
    assert total == Counter(DISHES), total
    print(f"{total.total()} dishes:", ", ".join(f"{n} {dish}" for dish, n in total.items()))
