"""A training's thread allocates where memory is kept, and its outcome is the function's."""

import gc
import subprocess
import sys
import threading
import weakref

import pytest

from lvm_ray.train import memory

glibc = pytest.mark.skipif(not memory._is_glibc(), reason="arenas are glibc's")


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
    """In a process of its own: among many threads a new one may be given the main arena by chance."""
    script = """
import threading
from lvm_ray.train import memory
found = [memory.on_heap()]
def twice():
    found.append(memory.on_heap())
    found.extend(memory.in_main_arena(memory.on_heap) for _ in range(2))
thread = threading.Thread(target=twice)
thread.start()
thread.join()
print(found)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[True, False, True, True]\n"


@glibc
def test_the_threads_that_were_tried_end():
    before = set(threading.enumerate())
    assert elsewhere(lambda: memory.in_main_arena(memory.on_heap))
    for thread in set(threading.enumerate()) - before:
        thread.join(5)
    assert set(threading.enumerate()) <= before


def test_the_first_thread_stays_where_it_is(monkeypatch):
    monkeypatch.setattr(memory, "on_heap", lambda: True)
    assert memory.in_main_arena(threading.current_thread) is threading.current_thread()


def test_what_a_function_raises_is_raised_and_nothing_of_it_is_kept():
    class Model:
        pass

    def fails():
        model = Model()
        made.append(weakref.ref(model))
        raise ValueError("no number")

    def run():
        try:
            memory.in_main_arena(fails)
        except ValueError as error:
            said.append(str(error))

    made, said = [], []
    gc.disable()
    try:
        elsewhere(run)
        assert said == ["no number"] and made[0]() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("more_threads", [True, False])
def test_without_such_an_arena_the_function_runs_all_the_same(monkeypatch, more_threads):
    monkeypatch.setattr(memory, "on_heap", lambda: False)
    if not more_threads:
        monkeypatch.setattr(threading.Thread, "start", lambda thread: (_ for _ in ()).throw(RuntimeError("can't start")))
    asked = []
    assert memory.in_main_arena(lambda: asked.append(threading.current_thread()) or 7) == 7
    assert asked == [threading.current_thread()]
