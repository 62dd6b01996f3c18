"""Runs CPython's own tests of multiprocessing managers against taskrun's.

    python runner.py TEST_CLASS SECONDS [START_METHOD]

On any Python with the ``test`` package, taskrun importable, nothing else.  The manager
classes are put in the place of the standard library's before the tests are imported.  One
line of JSON for each test goes to stdout; a test that takes longer than SECONDS ends the
process, with the traceback of every thread on stderr.
"""

import faulthandler
import json
import multiprocessing
import multiprocessing.managers
import sys
import unittest

import taskrun.manager.managers as ours


def patch():
    """From now on, whoever asks multiprocessing for managers gets ours."""
    multiprocessing.managers.BaseManager = ours.BaseManager
    multiprocessing.managers.SyncManager = ours.SyncManager


def test_class(name, start_method):
    """One of the classes that the standard library generates from its test module."""
    from test import _test_multiprocessing as tests

    for only_type in ("manager", None):  # None: also those that are for no one type
        found = {"__name__": "__main__"}
        tests.install_tests_in_module_dict(found, start_method, only_type=only_type)
        if name in found:
            return found[name], found["setUpModule"], found["tearDownModule"]
    raise LookupError(name)


class Result(unittest.TestResult):
    """Says how each test ended, and has a deadline for each."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def startTest(self, test):
        super().startTest(test)
        self.how = ["passed", ""]
        faulthandler.dump_traceback_later(self.seconds, exit=True)

    def stopTest(self, test):
        super().stopTest(test)
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps([test._testMethodName, *self.how]), flush=True)

    def addSkip(self, test, reason):
        super().addSkip(test, reason)
        self.how = ["skipped", reason]

    def addError(self, test, err):
        super().addError(test, err)
        self.how = ["failed", self.errors[-1][1]]

    def addFailure(self, test, err):
        super().addFailure(test, err)
        self.how = ["failed", self.failures[-1][1]]


def prepare(name, start_method):
    """Put the class where a spawned child finds it again; and what goes around its tests."""
    patch()
    found, set_up, tear_down = test_class(name, start_method)
    found.__module__ = __name__
    globals()[name] = found
    return found, set_up, tear_down


def main(name, seconds, start_method="fork"):
    found, set_up, tear_down = prepare(name, start_method)
    set_up()
    result = Result(float(seconds))
    unittest.defaultTestLoader.loadTestsFromTestCase(found).run(result)
    faulthandler.dump_traceback_later(float(seconds), exit=True)
    tear_down()
    for test, error in result.errors:  # of setUpClass and tearDownClass
        if not hasattr(test, "_testMethodName"):
            print(json.dumps([str(test), "failed", error]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
elif __name__ == "__mp_main__":  # in a spawned child, which has our sys.argv
    prepare(sys.argv[1], "spawn")
