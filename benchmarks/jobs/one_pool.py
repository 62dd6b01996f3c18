import multiprocessing

from work import double


def one():
    print(double(21))


if __name__ == "__main__":
    with multiprocessing.get_context("forkserver").Pool(2) as pool:
        pool.apply(one)
