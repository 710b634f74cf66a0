"""A training's thread allocates where memory is kept, and its outcome is the function's."""

import sys
import threading

import pytest

from lvm_ray.train import memory

glibc = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="arenas are glibc's")


def elsewhere(function):
    """What a function returns or raises in a thread that is not the process's first."""
    outcome = []

    def run():
        try:
            outcome.append(function())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return outcome[0]


@glibc
def test_a_training_in_another_thread_allocates_from_the_heap_of_the_first():
    assert memory.on_heap() and not elsewhere(memory.on_heap)
    before = set(threading.enumerate())
    assert [elsewhere(lambda: memory.in_main_arena(memory.on_heap)) for _ in range(5)] == [True] * 5
    for thread in set(threading.enumerate()) - before:
        thread.join(5)
    assert set(threading.enumerate()) == before


def test_the_first_thread_stays_where_it_is(monkeypatch):
    monkeypatch.setattr(memory, "on_heap", lambda: True)
    assert memory.in_main_arena(threading.current_thread) is threading.current_thread()


def test_what_a_function_raises_is_raised():
    error = elsewhere(lambda: memory.in_main_arena(lambda: [][1]))
    assert isinstance(error, IndexError)


def test_without_such_an_arena_the_function_runs_all_the_same(monkeypatch):
    monkeypatch.setattr(memory, "on_heap", lambda: False)
    asked = []
    assert memory.in_main_arena(lambda: asked.append(threading.current_thread()) or 7) == 7
    assert asked == [threading.current_thread()]
