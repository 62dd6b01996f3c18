"""The calls of even.py on the standard library's pool, one at a time, as they are there."""

import multiprocessing

from work import CALLS, chore

if __name__ == "__main__":
    with multiprocessing.get_context("forkserver").Pool(2) as pool:
        print(sum(pool.imap_unordered(chore, range(CALLS), chunksize=1)))
