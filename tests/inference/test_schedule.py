"""The queue of a batch, without any model: what is made together, in which order, and again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.schedule import Estimate, Failure, Queue, Task, micro_batches


def failure(kind) -> Failure:
    return Failure(kind, f"a_{kind}", "it broke")


def queue(rows: str, micro_batch: int = 1, retries: int = 1, missing=None) -> Queue:
    """Rows by their shape, a letter; later letters cost more."""
    wanted = range(len(rows)) if missing is None else missing
    return Queue(rows, [float(ord(shape)) for shape in rows], wanted, micro_batch, retries)


def work_off(
    queue: Queue,
    outcome: Callable[[Task, int, bool], Failure | None],
    actors: int = 1,
    room: int = 2,
) -> tuple[list[int], dict[int, Failure]]:
    """Run a queue dry on some actors; what was made, in order, and what failed for good.

    ``outcome`` says what becomes of (task, row, whether another task was beside it).
    """
    made: list[int] = []
    failed: dict[int, Failure] = {}
    busy: list[list[Task]] = [[] for _ in range(actors)]
    for _ in range(10_000):
        for tasks in sorted(busy, key=len):
            while len(tasks) < room and (task := queue.take(tasks)) is not None:
                tasks.append(task)
        tasks = max(busy, key=len)
        if not tasks:
            assert not len(queue)
            return made, failed
        assert not (len(tasks) > 1 and any(t.alone for t in tasks))
        task = tasks[0]
        results = {row: outcome(task, row, len(tasks) > 1) for row in task.rows}
        del tasks[0]
        failures = {row: f for row, f in results.items() if f is not None}
        made += [row for row in task.rows if row not in failures]
        failed |= queue.give_back(task, failures)
    raise AssertionError("the queue never ends")


def test_equal_shapes_share_a_micro_batch_in_the_order_of_the_manifest():
    assert micro_batches("abaabc", 2) == [(0, 2), (3,), (1, 4), (5,)]
    assert micro_batches("abaabc", 1) == [(0,), (2,), (3,), (1,), (4,), (5,)]
    assert micro_batches("", 4) == []


def test_what_costs_most_comes_first_and_what_is_there_is_left_out():
    tasks, waiting = [], queue("abaabc", micro_batch=2, missing=[0, 1, 2, 5])
    while (task := waiting.take([])) is not None:
        tasks.append(task.rows)
    # (0, 2) costs 2 x 97, (5) 99, (1), whose partner 4 is finished, 98
    assert tasks == [(0, 2), (5,), (1,)]


@given(st.text("ab", max_size=12), st.integers(1, 4), st.integers(1, 3), st.data())
def test_every_row_ends_once_and_micro_batches_do_not_depend_on_actors(rows, size, actors, data):
    seen: list[tuple[int, ...]] = []

    def outcome(task: Task, row: int, _beside: bool) -> None:
        if row == task.rows[0]:
            seen.append(task.rows)

    missing = data.draw(st.sets(st.sampled_from(range(len(rows)))) if rows else st.just(set()))
    made, failed = work_off(queue(rows, size, missing=missing), outcome, actors)
    assert sorted(made) == sorted(missing)
    assert failed == {}
    whole = micro_batches(rows, size)
    assert set(seen) == {tuple(r for r in g if r in missing) for g in whole} - {()}


@given(
    st.text("ab", min_size=1, max_size=10),
    st.integers(1, 4),
    st.integers(0, 3),
    st.dictionaries(st.integers(0, 9), st.sampled_from(["error", "final", "memory", "death"])),
)
def test_only_rows_that_always_fail_fail_for_good(rows, size, retries, bad):
    """A bad row spoils the micro-batch it is in; the others of it are made all the same."""

    def outcome(task: Task, row: int, beside: bool) -> Failure | None:
        kinds = [bad[r] for r in task.rows if r in bad]
        if "death" in kinds:
            return failure("death")
        return failure(kinds[0]) if kinds else None

    made, failed = work_off(queue(rows, size, retries), outcome)
    culprits = {row for row in range(len(rows)) if row in bad}
    assert set(failed) == culprits
    assert sorted(made) == [row for row in range(len(rows)) if row not in culprits]


@pytest.mark.parametrize(
    ("kind", "beside", "tries"),
    [("error", False, 3), ("final", False, 1), ("memory", True, 4), ("death", True, 4)],
)
def test_how_often_a_row_is_tried(kind: str, beside: bool, tries: int):
    """Two retries; a death or a lack of memory beside another task is not counted."""
    count = 0

    def outcome(task: Task, row: int, is_beside: bool) -> Failure | None:
        nonlocal count
        if row != 0:
            return None
        count += 1
        assert is_beside == (beside and count == 1)
        return failure(kind)

    made, failed = work_off(queue("ba", retries=2), outcome, room=2 if beside else 1)
    assert (made, failed, count) == ([1], {0: failure(kind)}, tries)


def test_out_of_memory_halves_the_micro_batch_for_all_of_its_shape():
    sizes: list[int] = []

    def outcome(task: Task, row: int, _beside: bool) -> Failure | None:
        if row == task.rows[0]:
            sizes.append(len(task.rows))
        return failure("memory") if len(task.rows) > 2 else None

    waiting = queue("a" * 16, micro_batch=8)
    made, failed = work_off(waiting, outcome, room=1)
    assert (sorted(made), failed) == (list(range(16)), {})
    # 8 does not fit, nor does 4; the second 8 is never tried
    assert sizes == [8, 4, *[2] * 8]
    assert waiting.halved == 2


def test_an_actor_has_one_task_while_another_is_written_and_nothing_beside_a_suspect():
    waiting = queue("abcd")
    first, second = waiting.take([]), waiting.take([Task((9,))])
    assert first == Task((3,)) and second == Task((2,))
    assert waiting.take([first, second]) is None
    waiting.give_back(first, {3: failure("death")})
    assert waiting.take([Task((9,), alone=True)]) is None
    assert [waiting.take([second]), waiting.take([second])] == [Task((1,)), Task((0,))]
    assert waiting.take([second]) is None  # only the suspect is left
    assert waiting.take([]) == Task((3,), alone=True)


def test_the_estimate_goes_by_cost_and_counts_from_the_first_ready_model():
    now = 100.0
    estimate = Estimate(10.0, lambda: now)
    now = 200.0  # loading
    estimate.begin()
    assert estimate.left_s is None
    now = 204.0
    estimate.begin()  # a second model is ready
    estimate.add(4.0)
    assert estimate.left_s == pytest.approx(6.0)
    now = 210.0
    estimate.add(6.0)
    assert estimate.left_s == 0
