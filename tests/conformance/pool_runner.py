"""Runs CPython's own tests of multiprocessing.Pool against taskrun's.

    python pool_runner.py TEST_CLASS SECONDS START_METHOD

As ``runner.py``: on any Python with the ``test`` package; one line of JSON for each test, a
deadline for each.
"""

import faulthandler
import multiprocessing
import multiprocessing.pool
import sys
import unittest

from runner import Result

import taskrun.pool


def patch():
    """From now on, whoever asks multiprocessing for a Pool gets ours."""

    def pool(self, *args, **kwargs):
        return taskrun.pool.Pool(*args, **kwargs, context=self.get_context())

    multiprocessing.context.BaseContext.Pool = pool
    multiprocessing.Pool = multiprocessing.context._default_context.Pool
    multiprocessing.pool.Pool = taskrun.pool.Pool


def prepare(name, start_method):
    """Put the class where a spawned child finds it again; and what goes around its tests."""
    patch()
    from test import _test_multiprocessing as tests

    found = {"__name__": "__main__"}
    tests.install_tests_in_module_dict(found, start_method, only_type="processes")
    test_class = found[name]
    test_class.__module__ = __name__
    globals()[name] = test_class
    return test_class, found["setUpModule"], found["tearDownModule"]


def main(name, seconds, start_method):
    found, set_up, tear_down = prepare(name, start_method)
    set_up()
    result = Result(float(seconds))
    unittest.defaultTestLoader.loadTestsFromTestCase(found).run(result)
    faulthandler.dump_traceback_later(float(seconds), exit=True)
    tear_down()
    for test, error in result.errors:  # of setUpClass and tearDownClass
        if not hasattr(test, "_testMethodName"):
            raise SystemExit(f"{test}: {error}")


if __name__ == "__main__":
    main(*sys.argv[1:])
elif __name__ == "__mp_main__":  # in a spawned child, which has our sys.argv
    prepare(sys.argv[1], sys.argv[3])
