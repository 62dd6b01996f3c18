from dask import config, delayed
from distributed import Client, LocalCluster
from work import CALLS, FAN_IN


@delayed(pure=False)
def root():
    return 1


@delayed(pure=False)
def leaf(base, number):
    return base + number


@delayed(pure=False)
def pair(left, right):
    return left + right


@delayed(pure=False)
def added(numbers):
    return sum(numbers)


def graph():
    base = root()
    leaves = [leaf(base, number) for number in range(CALLS)]
    level = [pair(leaves[at - 1], leaves[at]) for at in range(CALLS)]
    while len(level) > 1:
        level = [added(level[at : at + FAN_IN]) for at in range(0, len(level), FAN_IN)]
    return level[0]


if __name__ == "__main__":
    config.set({"distributed.logging.distributed": "error"})
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster),
    ):
        print(graph().compute())
