"""Tasks in processes of their own: nothing that happens to one of them, or to the coordinator, may hurt or leak."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from lit_llm.launch import Interrupted, Task, ask_coordinator, devices, run_tasks, stop_requested
from tests.launch import launch_jobs as jobs

REPOSITORY = Path(__file__).parents[2]


def run(*functions_and_arguments, max_parallel=2, threads=1, poll_seconds=0.02, **options):
    numbered = enumerate(functions_and_arguments)
    tasks = [Task(str(number), function, tuple(args), threads=threads) for number, (function, *args) in numbered]
    return run_tasks(tasks, max_parallel=max_parallel, poll_seconds=poll_seconds, **options)


def wait_for(*paths, seconds=15.0):
    deadline = time.monotonic() + seconds
    while not all(Path(path).exists() for path in paths):
        assert time.monotonic() < deadline, f"{paths} did not appear"
        time.sleep(0.01)


def coordinator(tmp_path, body, how="script", folder="."):
    """A program without a `__main__` guard in a process and a process group of its own, as a user would start it."""
    program = (
        "import os, signal, sys, time\nimport launch_jobs as jobs\nfrom lit_llm.launch import *\n"
        "print('the program runs', flush=True)\n" + textwrap.dedent(body)
    )
    (tmp_path / "program.py").write_text(program)
    path = os.pathsep.join([str(Path(__file__).parent), str(REPOSITORY)])
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return subprocess.Popen(
        [sys.executable, *{"script": [tmp_path / "program.py"], "-m": ["-m", "program"], "-c": ["-c", program]}[how]],
        cwd=tmp_path / folder,
        env={**environment, "PYTHONPATH": path, "EARLY": "1", "MLFLOW_DISABLE_TELEMETRY": "true"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def descendants(process):
    return psutil.Process(process.pid).children(recursive=True)


def alive_after(processes, seconds):
    def alive():
        # A zombie is over: it waits for the container's init, if that ever reaps.
        return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if not alive():
                return []
        except psutil.NoSuchProcess:
            continue
        time.sleep(0.05)
    return alive()


# Results -----------------------------------------------------------------------------------------------------------


def test_outcomes_come_in_the_order_of_the_tasks():
    outcomes = run((jobs.nap, 0.3), (jobs.double, 4), (jobs.double, 5), max_parallel=3)
    assert [o.status for o in outcomes] == ["returned"] * 3
    assert [o.value for o in outcomes[1:]] == [8, 10]
    assert 0.3 <= outcomes[0].seconds < 3


def test_no_more_tasks_run_at_once_than_there_are_slots():
    spans = [o.value for o in run(*[(jobs.nap, 0.2)] * 6, max_parallel=2)]
    overlap = max(sum(began <= moment < ended for began, ended in spans) for moment, _ in spans)
    assert overlap == 2


def test_a_task_that_dies_in_any_way_leaves_the_others_whole():
    outcomes = run(
        (jobs.nap, 0.5),
        (jobs.fail, "two\nlines"),
        (jobs.kill_itself,),
        (jobs.leave, 3),
        (jobs.leave, 0),
        (jobs.leave_politely, 0),
        (jobs.double, 1),
        max_parallel=7,
    )
    assert [(o.status, o.error) for o in outcomes] == [
        ("returned", None),
        ("raised", "ValueError: two lines"),
        ("killed", "killed by SIGKILL"),
        ("killed", "exited with code 3 before it returned"),
        ("killed", "exited with code 0 before it returned"),  # an exit code is no success
        ("raised", "SystemExit: 0"),
        ("returned", None),
    ]
    assert "launch_jobs.py" in outcomes[1].traceback


def test_the_death_of_the_fork_server_costs_only_what_was_running():
    def kill_the_server(task):
        if task.name == "0":
            os.kill(server, signal.SIGKILL)

    server = run((jobs.surroundings,))[0].value["parent"]
    first, second = run((jobs.deaf, "/dev/null"), (jobs.double, 2), max_parallel=1, on_start=kill_the_server)
    assert (first.status, first.error) == ("killed", "killed, because the fork server died")
    assert second.value == 4


def test_a_value_of_many_megabytes_does_not_block():
    outcomes = run((jobs.megabytes, 24), (jobs.megabytes, 24), (jobs.double, 1))
    assert [len(o.value) for o in outcomes[:2]] == [24 << 20] * 2


def test_a_value_that_cannot_cross_is_an_error_that_says_so():
    there, back = run((jobs.unpicklable,), (jobs.unreadable,))
    assert there.status == back.status == "raised"
    assert there.error.startswith("TypeError: the returned function cannot be pickled: ")
    assert back.error == "the returned value cannot be read: ValueError: not to be read"


def test_an_answer_counts_even_if_the_process_would_not_end():
    (outcome,) = run((jobs.answer_but_stay,), grace_seconds=0.3)
    assert (outcome.status, outcome.value) == ("returned", "answered")


def test_what_a_task_has_started_ends_with_it():
    (outcome,) = run((jobs.leave_a_helper,))
    assert alive_after([psutil.Process(outcome.value)] if psutil.pid_exists(outcome.value) else [], 2) == []


def test_the_log_receives_all_that_the_process_writes(tmp_path):
    log = tmp_path / "new" / "log.txt"
    tasks = [Task(word, jobs.speak, (word,), log) for word in ("one", "two")]
    run_tasks([*tasks, Task("bad", jobs.fail, ("no luck",), log)], max_parallel=1)
    text = log.read_text()
    for word in ("one", "two"):
        assert {word, f"{word} of a shell", f"{word} of C", f"{word} stderr"} <= set(text.splitlines())
    assert "ValueError: no luck" in text


def test_callbacks_follow_the_tasks():
    seen = []
    outcomes = run(
        (jobs.double, 1),
        (jobs.nap, 0.3),
        max_parallel=1,
        on_start=lambda task: seen.append(("start", task.name)),
        on_finish=lambda outcome: seen.append(("finish", outcome.task.name)),
        on_poll=lambda: seen.append("tick"),
        poll_seconds=0.05,
    )
    assert [s for s in seen if s != "tick"] == [("start", "0"), ("finish", "0"), ("start", "1"), ("finish", "1")]
    assert seen.count("tick") >= 5
    assert [o.status for o in outcomes] == ["returned"] * 2


def test_a_callback_that_raises_leaves_no_child(tmp_path):
    def refuse(task):
        wait_for(tmp_path / "ready")
        raise RuntimeError("a bug of ours")

    before = set(psutil.Process().children(recursive=True))
    with pytest.raises(RuntimeError, match="a bug of ours"):
        run((jobs.deaf, tmp_path / "ready", True), on_start=refuse, grace_seconds=0.2)
    new = set(psutil.Process().children(recursive=True)) - before
    assert not [p for p in new if "sleep" in p.cmdline()]


def test_a_callback_that_raises_lets_the_tasks_save(tmp_path):
    """Their work is worth more than the coordinator's trouble; a question is answered meanwhile, by None."""

    def fail_once_both_run(task):
        if task.name == "1":
            wait_for(tmp_path / "ready0", tmp_path / "ready1")
            raise OSError(28, "No space left on device")

    jobs_of_two = [(jobs.until_stopped, tmp_path / f"ready{n}", tmp_path / f"saved{n}") for n in range(2)]
    with pytest.raises(OSError, match="No space left"):
        run(*jobs_of_two, on_start=fail_once_both_run)
    assert [(tmp_path / f"saved{n}").read_text() for n in range(2)] == ["checkpoint"] * 2


def test_one_task_is_stopped_for_a_reason_and_the_others_go_on(tmp_path):
    """It may save first; one that does not listen is killed after the grace."""

    def too_slow(task):
        ready = all((tmp_path / f"ready{n}").exists() for n in range(2))
        return "no progress for 3 s" if ready and task.name in "01" else None

    polite, deaf, other = run(
        (jobs.until_stopped, tmp_path / "ready0", tmp_path / "saved"),
        (jobs.deaf, tmp_path / "ready1"),
        (jobs.nap, 0.5),
        max_parallel=3,
        to_stop=too_slow,
        grace_seconds=0.2,
    )
    assert (polite.status, polite.error, polite.value) == ("killed", "no progress for 3 s", "saved")
    assert (deaf.status, deaf.error, deaf.value) == ("killed", "no progress for 3 s", None)
    assert other.status == "returned"


# What is refused ---------------------------------------------------------------------------------------------------


def test_wrong_launches_are_refused_before_anything_starts():
    task = Task("twin", jobs.double, (1,))
    started = []
    with pytest.raises(ValueError, match="same name: twin"):
        run_tasks([task, task], max_parallel=1, on_start=started.append)
    for none in (0, -1, []):
        with pytest.raises(ValueError, match="max_parallel"):
            run_tasks([task], max_parallel=none, on_start=started.append)
    with pytest.raises(ValueError, match=r"'local' cannot be sent .* importable module"):
        run_tasks([task, Task("local", lambda: None)], max_parallel=1, on_start=started.append)
    with pytest.raises(ValueError, match="threads"):
        Task("idle", jobs.double, threads=0)
    assert started == []


def test_no_task_is_no_work():
    assert run_tasks([], max_parallel=1) == []


def test_a_module_that_cannot_be_preloaded_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "half_installed.py").write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="no_such_module"):
        run((jobs.double, 1), preload=["no_such_module"])
    with pytest.raises(ImportError, match="no_such_dependency"):
        run((jobs.double, 1), preload=["half_installed"])
    (tmp_path / "latecomer.py").touch()
    with pytest.warns(UserWarning, match="latecomer"):  # the server of this process runs already
        assert run((jobs.double, 1), preload=["latecomer"])[0].value == 2


def test_a_preload_that_kills_the_fork_server_is_an_error(tmp_path):
    (tmp_path / "explosive.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    process = coordinator(
        tmp_path,
        """
        try:
            run_tasks([Task("one", jobs.double, (1,))], max_parallel=1, preload=["explosive"])
        except ImportError as error:
            print(error)
        """,
    )
    output, _ = process.communicate(timeout=200)
    assert "the fork server died importing explosive" in output
    assert "torchvision::nms" in output


@pytest.mark.parametrize("imports", [["kill"], ["kill", "kill"], ["hide", "kill"]])
def test_a_kill_during_the_preload_is_no_fault_of_its_modules(tmp_path, imports):
    """The server imports first; one that hides an ImportError leaves the next import to a child."""
    (tmp_path / "mortal.py").write_text(
        textwrap.dedent(
            f"""
            import os, pathlib
            count = len(list(pathlib.Path().glob("import*")))
            pathlib.Path(f"import{{count}}").touch()
            match dict(enumerate({imports})).get(count):
                case "kill": os.kill(os.getpid(), 9)
                case "hide": raise ImportError
            """
        )
    )
    process = coordinator(
        tmp_path,
        """
        print(run_tasks([Task("one", jobs.double, (1,))], max_parallel=1, preload=["mortal"])[0].value)
        """,
    )
    output, _ = process.communicate(timeout=200)
    assert (tmp_path / f"import{len(imports)}").exists()
    assert output.splitlines()[-1] == "2", output


# A fresh, cheap process --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["script", "-c", "-m"])
def test_children_inherit_the_preload_and_never_run_the_callers_main(tmp_path, how):
    process = coordinator(
        tmp_path,
        """
        os.environ["LATER"] = "before"
        one = run_tasks([Task("a", jobs.surroundings)], max_parallel=1, preload=["fractions"])[0].value
        os.environ["LATER"] = "after"
        del os.environ["EARLY"]
        two = run_tasks([Task("a", jobs.surroundings, threads=2)], max_parallel=1, preload=["fractions"])[0].value
        assert one["main"] is two["main"] is None
        assert one["parent"] == two["parent"], "one fork server for all launches"
        assert one["fractions"] and "fractions" not in sys.modules
        assert one["sigint_ignored"] and not one["blocked"]
        assert one["path"] == [path or os.getcwd() for path in sys.path]
        one, two = one["environment"], two["environment"]
        assert (one["LATER"], two["LATER"]) == ("before", "after")
        assert "EARLY" in one and "EARLY" not in two
        assert one["MLFLOW_DISABLE_TELEMETRY"] == "true"
        assert one["PYTHONPATH"] == os.environ["PYTHONPATH"] and "PYTHONSAFEPATH" not in one
        assert (one["OMP_NUM_THREADS"], two["OMP_NUM_THREADS"]) == ("1", "2")
        assert "OMP_NUM_THREADS" not in os.environ
        print("as promised")
        """,
        how,
    )
    output, _ = process.communicate(timeout=200)
    assert output.splitlines() == ["the program runs", "as promised"]


def test_each_slot_has_its_own_variables():
    environments = [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    outcomes = run((jobs.surroundings,), (jobs.nap, 0.3), (jobs.surroundings,), max_parallel=environments)
    assert {o.value["environment"]["CUDA_VISIBLE_DEVICES"] for o in (outcomes[0], outcomes[2])} <= {"0", "1"}
    at_once = run(*[(jobs.device_for, 0.3)] * 2, max_parallel=environments)
    assert {o.value for o in at_once} == {"0", "1"}


def test_a_file_of_the_users_does_not_shadow_a_library(tmp_path):
    """`python -c`, as which the fork server starts, would import from the working directory first."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "fractions.py").write_text("raise RuntimeError('the wrong file')")
    body = 'print(run_tasks([Task("a", jobs.double, (1,))], max_parallel=1, preload=["fractions"])[0].value)'
    output, _ = coordinator(tmp_path, body, folder="data").communicate(timeout=200)
    assert output.splitlines() == ["the program runs", "2"]


def test_tasks_do_not_share_their_random_numbers(tmp_path):
    body = """
        tasks = [Task(name, jobs.random_numbers) for name in "ab"]
        numbers = [outcome.value for outcome in run_tasks(tasks, max_parallel=1, preload=["numpy.random"])]
        print(len({number for pair in numbers for number in pair}))
        """
    output, _ = coordinator(tmp_path, body).communicate(timeout=200)
    assert output.splitlines() == ["the program runs", "4"]


def test_a_task_computes_the_same_bits_as_a_fresh_process_with_as_many_threads(tmp_path):
    """The fork server has imported torch but never used it: it has no thread, and the child's count is the task's."""
    process = coordinator(
        tmp_path,
        """
        for threads in (1, 2):
            tasks = [Task(f.__name__, f, threads=threads) for f in (jobs.surroundings, jobs.product_and_gradient)]
            seen, forked = [outcome.value for outcome in run_tasks(tasks, max_parallel=1, preload=["torch"])]
            assert (seen["server_threads"], seen["torch_threads"]) == (1, threads)
            import torch
            torch.set_num_threads(threads)
            assert forked == jobs.product_and_gradient()
        print("as promised")
        """,
    )
    output, _ = process.communicate(timeout=200)
    assert output.splitlines() == ["the program runs", "as promised"]


# Stopping ----------------------------------------------------------------------------------------------------------


def stop_when(ready, number, times=1):
    """A callback that signals this process once the file is there."""
    sent = []

    def on_poll():
        if ready.exists() and len(sent) < times:
            sent.append(os.kill(os.getpid(), number))

    return on_poll


BATCH = [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]
"""What batch systems send, and a terminal that is closed."""


@pytest.mark.parametrize("number", [signal.SIGINT, *BATCH])
def test_the_first_signal_lets_tasks_save_and_starts_no_more(tmp_path, number):
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as caught:
        run(
            (jobs.double, 1),
            (jobs.until_stopped, tmp_path / "ready", tmp_path / "saved"),
            (jobs.double, 2),
            max_parallel=1,
            on_poll=stop_when(tmp_path / "ready", number),
        )
    done, stopped, never = caught.value.outcomes
    assert (done.status, done.value) == ("returned", 2)
    assert (stopped.status, stopped.value) == ("interrupted", "saved")
    assert (never.status, never.value, never.seconds) == ("interrupted", None, 0)
    assert (tmp_path / "saved").read_text() == "checkpoint"
    assert signal.getsignal(number) is before
    assert not stop_requested()


def test_a_task_that_does_not_listen_is_killed_after_the_grace(tmp_path):
    with pytest.raises(Interrupted) as caught:
        run(
            (jobs.deaf, tmp_path / "ready", True),
            on_poll=stop_when(tmp_path / "ready", signal.SIGINT),
            grace_seconds=0.4,
        )
    (outcome,) = caught.value.outcomes
    assert (outcome.status, outcome.error) == ("interrupted", "killed by SIGKILL after it was asked to stop")
    assert not [p for p in psutil.Process().children(recursive=True) if "sleep" in p.cmdline()]


def test_a_second_signal_kills_at_once(tmp_path):
    began = time.monotonic()
    with pytest.raises(Interrupted) as caught:
        run(
            (jobs.deaf, tmp_path / "ready"),
            on_poll=stop_when(tmp_path / "ready", signal.SIGINT, times=2),
            grace_seconds=60,
        )
    assert caught.value.outcomes[0].status == "interrupted"
    assert time.monotonic() - began < 10


def test_what_a_batch_system_repeats_is_no_impatience(tmp_path):
    """SIGUSR1 before the limit and SIGTERM at it, or two SIGHUPs of a closed terminal: the task still saves."""
    sent = iter(BATCH * 2)

    def on_poll():
        if (tmp_path / "ready").exists() and (number := next(sent, None)) is not None:
            os.kill(os.getpid(), number)

    with pytest.raises(Interrupted) as caught:
        run((jobs.until_stopped, tmp_path / "ready", tmp_path / "saved", 0.3), on_poll=on_poll)
    assert [(outcome.status, outcome.value) for outcome in caught.value.outcomes] == [("interrupted", "saved")]


@pytest.mark.parametrize("number", BATCH)
def test_a_task_that_is_signalled_itself_saves_and_its_helpers_live_until_then(number, tmp_path):
    """A batch system may signal every process of a job: a forked helper of the task's is not to die of it first."""

    def signal_both(task):
        wait_for(tmp_path / "ready")
        helper, pid = map(int, (tmp_path / "ready").read_text().split())
        for one in (helper, pid) if number != signal.SIGTERM else (pid,):
            os.kill(one, number)

    (outcome,) = run((jobs.with_a_forked_helper, tmp_path / "ready"), on_start=signal_both)
    assert (outcome.status, outcome.value) == ("returned", "the helper lives")


def test_ctrl_c_in_a_terminal_reaches_the_coordinator_alone(tmp_path):
    """A terminal signals its whole foreground process group."""
    process = coordinator(
        tmp_path,
        """
        task = Task("polite", jobs.until_stopped, ("ready", "saved"))
        try:
            run_tasks([task], max_parallel=1)
        except KeyboardInterrupt as stop:
            print([(outcome.status, outcome.value) for outcome in stop.outcomes])
        """,
    )
    wait_for(tmp_path / "ready")
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=200)
    assert output.splitlines() == ["the program runs", "[('interrupted', 'saved')]"]


def test_ctrl_c_during_the_preload_does_not_wait_for_it(tmp_path):
    (tmp_path / "slow.py").write_text("import pathlib, time; pathlib.Path('ready').touch(); time.sleep(8)")
    process = coordinator(
        tmp_path,
        """
        try:
            run_tasks([Task("a", jobs.double, (1,))], max_parallel=1, preload=["slow"])
        except KeyboardInterrupt as stop:
            print([outcome.status for outcome in stop.outcomes], flush=True)
            os._exit(0)
        """,
    )
    wait_for(tmp_path / "ready")
    everyone = descendants(process)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=7) == 0
    assert alive_after(everyone, 60) == []
    output, _ = process.communicate()
    assert output.splitlines() == ["the program runs", "['interrupted']"]


def test_a_killed_coordinator_leaves_no_orphan(tmp_path):
    process = coordinator(
        tmp_path,
        """
        tasks = [
            Task("polite", jobs.until_stopped, ("ready1", "saved")),
            Task("deaf", jobs.deaf, ("ready2", True)),
            Task("next", jobs.double, (1,)),
        ]
        run_tasks(tasks, max_parallel=2, grace_seconds=1)
        """,
    )
    wait_for(tmp_path / "ready1", tmp_path / "ready2")
    everyone = descendants(process)
    assert len(everyone) == 5  # fork server, resource tracker, two tasks and the process of one of them
    process.kill()
    process.communicate()
    wait_for(tmp_path / "saved")
    assert alive_after(everyone, 5) == []


# Questions and tasks that come later -------------------------------------------------------------------------------


def test_a_task_consults_the_coordinator_and_goes_on_with_its_answers():
    asked = []

    def answer(task, question):
        asked.append((task.name, question))
        return question * 2

    outcomes = run((jobs.ask, 1, 2), (jobs.ask, "a" * 100_000), on_question=answer)
    assert [outcome.value for outcome in outcomes] == [[2, 4], ["a" * 200_000]]
    assert [question for name, question in asked if name == "0"] == [1, 2]


def test_a_question_that_nobody_answers_is_answered_by_none():
    assert run((jobs.ask, 1))[0].value == [None]
    assert ask_coordinator("outside of a task") is None


def test_a_task_that_dies_while_it_waits_for_an_answer_is_told_as_killed():
    outcomes = run((jobs.ask_and_die, 1), (jobs.double, 4), on_question=lambda *_: time.sleep(0.5))
    assert [(outcome.status, outcome.value) for outcome in outcomes] == [("killed", None), ("returned", 8)]


def test_a_question_to_a_coordinator_that_is_gone_is_answered_by_none(tmp_path):
    body = f"""
    run_tasks([Task("a", jobs.ask_after_the_coordinators_end, ({str(tmp_path / "answer")!r},))], max_parallel=1,
              on_start=lambda task: (time.sleep(0.5), os.kill(os.getpid(), signal.SIGKILL)))
    """
    process = coordinator(tmp_path, body)
    process.communicate(timeout=200)
    wait_for(tmp_path / "answer")
    assert (tmp_path / "answer").read_text() == "None"


def test_tasks_of_an_iterator_are_taken_when_there_is_a_slot():
    """The next task may depend on what the others have returned; None asks for patience."""
    found, given = [], []

    def tasks():
        for number in range(5):
            while len(given) - len(found) >= 2:
                yield None
            given.append(number)
            yield Task(str(number), jobs.double, (sum(found),))

    most = []
    outcomes = run_tasks(
        tasks(),
        max_parallel=3,
        on_finish=lambda outcome: found.append(outcome.value + 1),
        on_start=lambda _: most.append(len(given) - len(found)),
        poll_seconds=0.01,
    )
    assert [outcome.task.name for outcome in outcomes] == list("01234")
    assert max(most) == 2
    assert outcomes[-1].value >= 2


def test_an_iterator_without_a_task_starts_nothing():
    assert run_tasks(iter(()), max_parallel=1, preload=["no_such_module"]) == []


def test_a_task_of_two_slots_sees_the_devices_of_both():
    slots = [{"CUDA_VISIBLE_DEVICES": name} for name in ("0", "1", "0", "1")]
    tasks = [Task("one", jobs.device_for, (0.3,)), Task("two", jobs.device_for, (0.3,), slots=2)]
    one, two = (outcome.value for outcome in run_tasks(tasks, max_parallel=slots, poll_seconds=0.02))
    assert one in ("0", "1")
    assert sorted(two.split(",")) == ["0", "1"]


def test_a_task_waits_for_as_many_slots_as_it_takes():
    spans = run_tasks(
        [Task("one", jobs.nap, (0.2,)), Task("two", jobs.nap, (0.2,), slots=2), Task("three", jobs.nap, (0.2,))],
        max_parallel=2,
        poll_seconds=0.02,
    )
    first, wide, last = (outcome.value for outcome in spans)
    assert first[1] <= wide[0]
    assert wide[1] <= last[0]


def test_a_task_that_takes_more_devices_than_there_are_is_refused():
    shares_of_one_gpu = [{"CUDA_VISIBLE_DEVICES": "0"}] * 2
    for slots in (1, shares_of_one_gpu):
        with pytest.raises(ValueError, match="'wide' takes 2"):
            run_tasks([Task("wide", jobs.double, (1,), slots=2)], max_parallel=slots)


def test_slots_are_spread_over_the_visible_gpus(monkeypatch):
    monkeypatch.setattr(devices.Path, "glob", lambda *_: [devices.Path(f"/dev/nvidia{n}") for n in range(4)])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in devices.machine_slots(6)] == ["0", "1", "2", "3", "0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, GPU-8f")
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in devices.machine_slots(3)] == ["2", "GPU-8f", "2"]
    assert devices.machine_slots(2, use_gpus=False) == [{}, {}]
    assert devices.has_gpu()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices.machine_slots(1) == [{}]
    assert not devices.has_gpu(), "an empty list hides all of them"
