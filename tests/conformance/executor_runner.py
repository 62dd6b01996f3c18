"""Runs CPython's own tests of ProcessPoolExecutor against taskrun's Executor.

    python executor_runner.py TEST_MODULE SECONDS START_METHOD

As ``runner.py``: on any Python that came with ``test.test_concurrent_futures``; TEST_MODULE
is one of its modules.  One line of JSON for each test, a deadline for each.
"""

import concurrent.futures
import concurrent.futures.process
import faulthandler
import importlib
import sys
import unittest

from runner import Result

import taskrun.executor

MIXINS = {"fork": "ForkMixin", "forkserver": "ForkserverMixin", "spawn": "SpawnMixin"}


def patch():
    """From now on, whoever asks for a ProcessPoolExecutor gets ours."""
    concurrent.futures.ProcessPoolExecutor = taskrun.executor.Executor
    concurrent.futures.process.ProcessPoolExecutor = taskrun.executor.Executor


def main(name, seconds, start_method):
    patch()
    module = importlib.import_module(f"test.test_concurrent_futures.{name}")
    util = importlib.import_module("test.test_concurrent_futures.util")
    mixin = getattr(util, f"ProcessPool{MIXINS[start_method]}")
    module.setUpModule()
    result = Result(float(seconds))
    for found in list(vars(module).values()):
        if isinstance(found, type) and issubclass(found, mixin) and found is not mixin:
            unittest.defaultTestLoader.loadTestsFromTestCase(found).run(result)
    faulthandler.dump_traceback_later(float(seconds), exit=True)
    unittest.doModuleCleanups()


if __name__ == "__main__":
    main(*sys.argv[1:])
