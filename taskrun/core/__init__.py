"""The scheduler: events in, commands out.  ``scheduler`` has its theory and its one door.

Its parts, from the bottom: ``resources``, ``limits`` and ``timers``; ``ready`` and ``workforce``,
what waits and who works; ``claims``, ``placement`` and ``crowd``, which say what goes where;
``graph``, what follows from the end of a call; ``books``, in which all of that is kept; and, each
upon the one before, ``attempts``, ``children``, ``bunches`` and ``scheduler``, which say what an
event means.
"""
