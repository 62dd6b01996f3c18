"""The peer of tiny.py, and with one call that of a single trivial task."""

import multiprocessing

from work import CALLS, double

if __name__ == "__main__":
    with multiprocessing.get_context("forkserver").Pool(2) as pool:
        print(sum(pool.imap_unordered(double, range(CALLS), chunksize=1)))
