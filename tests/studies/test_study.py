"""A study's YAML, which runs it asks for, and that each is carried out once."""

import json
import platform
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import filelock
import pytest

from hf_chts.commands.app import main
from hf_chts.config import SparsityConfig
from hf_chts.studies import running
from hf_chts.studies.running import RunsFailed, check, missing, part_of, run_all, run_one
from hf_chts.studies.study import Study, merge

ROOT = Path(__file__).parents[2]


def quiet(line):
    pass


class TestReading:
    def test_settings_of_a_row_are_merged_into_those_of_the_study(self, made):
        study = made.load()
        rows = {row.name: row for row in study.rows}
        assert rows["set"].settings == {"epochs": 2, "sparsity": {"method": "set", "sparsity": 0.9}}
        assert rows["chts"].settings == {"epochs": 2, "base": 2, "sparsity": {"method": "chts", "sparsity": 0.9}}
        assert (study.name, study.title, study.task, study.quick) == ("made", "A *made* study", "played", False)
        assert (rows["set"].label, rows["set"].group, rows["set"].paper) == ("SET", "fixed density", (3.0,))
        assert (rows["gmp"].label, rows["gmp"].paper, rows["gmp"].seeds) == ("gmp", (), (0,))

    def test_merging_changes_neither(self):
        base, over = {"a": {"b": 1, "c": [1]}, "d": 2}, {"a": {"b": 5}, "d": 3, "f": {"e": 1}}
        merged = merge(base, over)
        assert merged == {"a": {"b": 5, "c": [1]}, "d": 3, "f": {"e": 1}}
        merged["a"]["c"].append(2)
        merged["f"]["e"] = 9
        assert base == {"a": {"b": 1, "c": [1]}, "d": 2}
        assert over == {"a": {"b": 5}, "d": 3, "f": {"e": 1}}

    @pytest.mark.parametrize("value", [0.99, None, "0.9"])
    def test_a_value_in_place_of_a_mapping_is_not_lost(self, made, value):
        with pytest.raises(ValueError, match="made.yaml: sparsity is .* in one place and .* in another: make both"):
            made.write(settings={"sparsity": value}).load()  # a row has a mapping
        with pytest.raises(ValueError, match="sparsity is .* in one place"):
            merge({"sparsity": {"method": "set"}}, {"sparsity": value})

    def test_runs_are_seed_by_seed_each_in_a_folder_of_its_own(self, made):
        runs = made.load().runs(Path("scratch"))
        assert [run.name for run in runs] == [
            "dense-0", "set-0", "chts-0", "gmp-0", "dense-1", "set-1", "chts-1", "dense-2", "set-2", "chts-2"
        ]  # fmt: skip
        assert runs[1].folder == Path("scratch/set-0")

    def test_the_short_form(self, made):
        quick = {"seeds": [7], "rows": ["chts", "set"], "settings": {"epochs": 1, "sparsity": {"sparsity": 0.5}}}
        study = made.write(quick=quick | {"title": "Short"}, reference=["dense", "set"]).load(quick=True)
        assert study.title == "Short"
        assert not any(row.paper for row in study.rows)  # compared with nobody
        assert [row.name for row in study.rows] == ["chts", "set"]
        assert study.rows[0].settings == {"epochs": 1, "base": 2, "sparsity": {"method": "chts", "sparsity": 0.5}}
        assert all(row.seeds == (7,) for row in study.rows)
        assert study.quick
        assert study.references == ("set",)  # dense is not in the short form
        assert made.load().rows[0].settings["epochs"] == 2

    def test_references(self, made):
        assert made.load().references == ()
        assert made.write(reference="set").load().references == ("set",)
        assert made.write(reference=["set", "dense"]).load().references == ("set", "dense")

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"seed": [1]}, "unknown field of a study 'seed'; did you mean 'seeds'"),
            ({"rows": {"a": {"labels": "A"}}}, "unknown field of row 'a' 'labels'; did you mean 'label'"),
            ({"rows": {}}, "rows is {}; it must map names of rows"),
            ({"seeds": [0, True]}, r"seeds is \[0, True\]; it must be a list of whole numbers"),
            ({"seeds": [-1]}, r"seeds is \[-1\]; it must be a list of whole numbers from 0 to 2"),
            ({"seeds": ["0"]}, r"seeds is \['0'\]; it must be a list of whole numbers"),
            ({"seeds": [1, 1]}, r"seeds is \[1, 1\]; each may be there once"),
            ({"rows": {1: {}}}, "the row 1 has a name that files cannot have"),
            ({"rows": {"ä" * 51: {}}}, "the row 'ä+' has a name that files cannot have: .* 100 of them at most"),
            ({"rows": {"a/b": {}}}, "the row 'a/b' has a name that files cannot have"),
            ({"rows": {"a": "b"}}, "row 'a' is a mapping of fields, got a str"),
            ({"rows": {"a": {"paper": "90"}}}, "paper of row 'a' is '90'; it must be a number, or it and its error"),
            ({"rows": {"a": {"label": 3}}}, "label of row 'a' is 3; it must be text"),
            ({"rows": {"a": {"settings": [1]}}}, r"settings of row 'a' is \[1\]; it must map names"),
            ({"settings": ["a"]}, r"settings is \['a'\]; it must map names"),
            ({"reference": {"set": 1}}, "the row as reference is {'set': 1}; it must be the name of a row"),
            ({"task": ["played"]}, r"task is \['played'\]; it must be text"),
            ({"title": None}, "title is None; it must be text"),
            ({"seeds": 3}, "seeds is 3; it must be a list of whole numbers"),
            ({"reference": "sett"}, "unknown row as reference 'sett'; did you mean 'set'"),
        ],
    )
    def test_what_is_wrong_is_named(self, made, fields, message):
        with pytest.raises(ValueError, match=f"made.yaml: .*{message}"):
            made.write(**fields).load()

    @pytest.mark.parametrize(
        ("quick", "message"),
        [
            ({"rows": ["chtss"]}, "unknown row in quick 'chtss'; did you mean 'chts'"),
            ({"row": ["chts"]}, "unknown field of quick 'row'; did you mean 'rows'"),
            ({"rows": "chts"}, "rows of quick is 'chts'; it must be a list of names of rows"),
            ({"rows": []}, r"rows of quick is \[\]; it must be a list of names of rows"),
        ],
    )
    def test_what_is_wrong_with_the_short_form_is_named(self, made, quick, message):
        with pytest.raises(ValueError, match=message):
            made.write(quick=quick).load(quick=True)

    def test_a_study_without_a_short_form(self, made):
        with pytest.raises(ValueError, match="it has no short form"):
            made.load(quick=True)

    def test_a_study_that_is_not_there(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="there is no study at .*gone.yaml"):
            Study.load(tmp_path / "gone.yaml")

    def test_settings_that_the_task_does_not_have(self, made):
        check(made.load())
        with pytest.raises(ValueError, match="row 'dense': unknown setting 'epoch'; did you mean 'epochs'"):
            check(made.write(settings={"epoch": 2}).load())
        with pytest.raises(ValueError, match="row 'dense': setting epochs is 'two'; it must be of type int"):
            check(made.write(settings={"epochs": "two"}).load())
        with pytest.raises(ValueError, match=r"row 'dense': setting sparsity is \['set'\]; it must be a mapping"):
            check(made.write(settings={"sparsity": ["set"]}, rows={"dense": {}}).load())
        with pytest.raises(ValueError, match="row 'dense': unknown setting 'metod'; did you mean 'method'"):
            check(made.write(settings={"sparsity": {"metod": "set"}}).load())
        with pytest.raises(ValueError, match="row 'dense': sparsity has topology_seed, .* leave it out"):
            check(made.write(settings={"sparsity": {"method": "set", "topology_seed": 1}}).load())

    @pytest.mark.parametrize(
        ("task", "settings", "message"),
        [
            ("classification", {"data": "digits", "epochs": 0}, "setting epochs is 0; it must be more than 0"),
            ("classification", {"data": "digits", "rate": 0.0}, "setting rate is 0.0; it must be more than 0"),
            ("classification", {"data": "cifar"}, "unknown data 'cifar'"),
            ("classification", {"data": "digits", "rate_until": 1.5}, "rate_until is 1.5; it must be a share"),
            ("classification", {"data": "digits", "end_rate": 5.0}, r"end_rate is 5.0, more than rate \(0.025\)"),
            ("classification", {"data": "digits", "momentum": 1.0}, "setting momentum is 1.0; .* less than 1"),
            (
                "classification",
                {"data": "digits", "threads": 1000000},
                "setting threads is 1000000; .* at least 1 and less than 1025",
            ),
            (
                "classification",
                {"data": "digits", "weight_decay": float("nan")},
                "setting weight_decay is nan; .* least 0",
            ),
            ("classification", {}, "setting data is missing"),
            ("language", {"evaluation_interval": 0}, "setting evaluation_interval is 0; it must be more than 0"),
            ("language", {"context": 1}, "setting context is 1; it must be at least 2"),
            ("language", {"evaluation_windows": -1}, "setting evaluation_windows is -1; it must be at least 0"),
            ("language", {"warmup": 2.0}, "setting warmup is 2.0; it must be at least 0 and less than 1"),
            ("language", {"update_warmup": -7}, "setting update_warmup is -7; it must be at least -1"),
            ("translation", {"beams": 0}, "setting beams is 0; it must be more than 0"),
            ("translation", {"longest": 600}, "setting longest is 600; it must be at least 1 and less than 256"),
            ("translation", {"sentences": -995}, "setting sentences is -995; it must be at least 0"),
            ("translation", {"heads": 3}, "width is 512, and heads 3: width must be a multiple"),
            ("translation", {"dropout": 2.0}, "setting dropout is 2.0; it must be at least 0 and less than 1"),
            ("translation", {"learning_rate": float("nan")}, "setting learning_rate is nan; it must be more than 0"),
        ],
    )
    def test_settings_out_of_their_range(self, made, task, settings, message):
        settings = settings | {"sparsity": {"method": "set", "sparsity": 0.9}}
        with pytest.raises(ValueError, match=f"row 'a': {message}"):
            check(made.write(task=task, settings=settings, rows={"a": {}}).load())

    @pytest.mark.parametrize("field", ["update_interval", "target_modules", "topology_seed"])
    def test_sparsity_that_follows_from_other_settings(self, made, field):
        settings = {"data": "digits", "sparsity": {"method": "set", field: 5}}
        with pytest.raises(ValueError, match=f"row 'a': sparsity has {field}, which follows"):
            check(made.write(task="classification", settings=settings, rows={"a": {}}).load())

    @pytest.mark.parametrize("path", sorted((ROOT / "studies").glob("*.yaml")), ids=lambda path: path.stem)
    def test_the_studies_of_the_repository(self, path):
        check(Study.load(path))
        check(Study.load(path, quick=True))


class TestWhatToRun:
    def test_parts_share_the_runs(self):
        runs = list(range(10))
        assert part_of(runs, "1/1") == runs
        assert part_of(runs, "2/3") == [1, 4, 7]
        assert sorted(run for k in range(1, 5) for run in part_of(runs, f"{k}/4")) == runs
        assert part_of(runs, "11/12") == []

    @pytest.mark.parametrize("only", ["0/3", "4/3", "2", "a/b", "1/0", "-1/3", "", "٣/٤", "1/" + "9" * 5000])
    def test_parts_that_are_none(self, only):
        with pytest.raises(ValueError, match="it must be like 17/64"):
            part_of([1], only)

    def test_what_has_a_result_is_not_missing(self, made):
        made.add("set-0", {})
        made.add("dense-2", {})
        study = made.load()
        left = [run.name for run in missing(study, study.runs(made.folder), made.results)]
        assert left == ["dense-0", "chts-0", "gmp-0", "dense-1", "set-1", "chts-1", "set-2", "chts-2"]

    def test_settings_that_json_writes_otherwise(self, made):
        made.write(settings={"base": float("inf"), "sparsity": {"layer_sparsity": {1: 0.5}}}, rows={"a": {}})
        study = made.load()
        made.add("a-0", {}, settings={"base": None, "sparsity": {"layer_sparsity": {"1": 0.5}}})
        assert [run.name for run in missing(study, study.runs(made.folder), made.results)] == ["a-1", "a-2"]

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"settings": {}}'])
    def test_damaged_results_are_named(self, made, text):
        (made.results / "set-0.json").write_text(text, encoding="utf-8")
        study = made.load()
        with pytest.raises(ValueError, match=r"set-0.json is not the result of a run.*: remove it to run it again"):
            missing(study, study.runs(made.folder), made.results)

    def test_an_unknown_task_is_no_fault_of_a_row(self, made):
        with pytest.raises(ValueError, match="^unknown task 'playd'; did you mean 'played'"):
            check(made.write(task="playd").load())

    def test_what_has_changed_is_told_with_both_values(self):
        changed = running._changed
        assert changed({"a": None}, {}) == "a None, now not set"
        assert changed({"s": {}}, {"s": {"method": "set"}}) == "s.method not set, now 'set'"
        assert changed({"x": "3", "y": [1]}, {"x": 3, "y": [1]}) == "x '3', now 3"
        assert (
            changed({"s": {"z": 0.3, "w": 1}}, {"s": {"z": 0.1, "w": 1}, "b": 2})
            == "b not set, now 2, s.z 0.3, now 0.1"
        )

    def test_results_of_other_settings_are_refused(self, made):
        made.add("set-0", {})
        study = made.write(settings={"epochs": 3, "sparsity": {"method": "chts", "sparsity": 0.9}}).load()
        with pytest.raises(ValueError, match=r"set-0.json was run with other settings \(epochs 2, now 3\): remove it"):
            missing(study, study.runs(made.folder), made.results)


class TestRunning:
    def share(self, made, runs, say=quiet):
        return run_all(made.path, made.load(), runs, made.results, made.folder / "scratch", "hf-chts study", say)

    @pytest.fixture
    def played(self, made, monkeypatch):
        """Runs in threads of this process, which has the task. The names of the runs that were begun."""
        begun = []

        really = subprocess.run

        def run(arguments, stdout=None, **options):
            if arguments[0] == "git":
                return really(arguments, **options)
            order = json.loads(arguments[-1])
            begun.append(order["run"])
            time.sleep(0.05)
            study = made.load()
            one = next(run for run in study.runs(Path(order["scratch"])) if run.name == order["run"])
            try:
                result = run_one(study, one, order["command"])
            except ValueError as error:
                print(f"ValueError: {error}", file=stdout)
                return subprocess.CompletedProcess(arguments, 1)
            Path(order["target"]).write_text(json.dumps(result), encoding="utf-8")
            return subprocess.CompletedProcess(arguments, 0)

        monkeypatch.setattr(running.subprocess, "run", run)
        return begun

    def test_a_result_has_all_that_the_page_needs(self, made):
        study = made.load()
        run = next(run for run in study.runs(made.folder) if run.name == "chts-1")
        result = run_one(study, run, "hf-chts study made.yaml")
        assert (result["row"], result["seed"], result["settings"]) == ("chts", 1, run.settings)
        assert result["figures"] == {"score": 3, "loss": 1.0, "links": 1200.0}
        assert (result["seconds"], result["processor_seconds"]) == (10.0, 8.0)
        assert 0 < result["memory_mib"]["before_training"] <= result["memory_mib"]["peak"]
        assert {"hf_chts", "torch"} <= set(result["machine"]["versions"])
        assert result["code"]["python"] == platform.python_version()
        assert result["all_settings"]["epochs"] == 2
        assert result["all_settings"]["sparsity"]["drop_fraction"] == SparsityConfig("chts").drop_fraction  # a default
        assert result["all_settings"]["sparsity"]["topology_seed"] == 1

    def test_a_result_names_the_commit_that_it_is_of(self, made, monkeypatch, tmp_path):
        def git(*what):
            names = ["-c", "user.name=a", "-c", "user.email=a@b"]
            command = ["git", "-C", str(tmp_path), *names, *what]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

        file = tmp_path / "hf_chts/studies/running.py"
        file.parent.mkdir(parents=True)
        file.touch()
        monkeypatch.setattr(running, "__file__", str(file))
        monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
        assert running._commit() == ""
        git("init")
        git("add", ".")
        git("commit", "-m", "first")
        assert running._commit() == git("rev-parse", "HEAD")
        (tmp_path / "hf_chts/other.py").write_text("1")
        assert running._commit() == git("rev-parse", "HEAD") + "+"

    def test_runs_leave_a_result_and_no_folder(self, made, played):
        runs = made.load().runs(made.folder / "scratch")[:2]
        done = self.share(made, runs)
        assert done == [made.results / "dense-0.json", made.results / "set-0.json"]
        assert not any(run.folder.exists() for run in runs)

    def test_a_run_that_fails_leaves_its_log_and_no_result_and_the_others_go_on(self, made, played):
        made.write(settings={"base": -1.0})
        runs = [run for run in made.load().runs(made.folder / "scratch") if run.name in ("dense-0", "chts-0")]
        log = runs[0].folder / "log.txt"
        with pytest.raises(RunsFailed, match=f"1 of 2 runs failed .dense-0.; .* base is -1.0; .*{log.name}"):
            self.share(made, runs)
        assert "base is -1.0" in log.read_text(encoding="utf-8")
        assert list(made.results.glob("*.json")) == [made.results / "chts-0.json"]  # it has a base of its own
        assert played == ["dense-0", "chts-0"]

    def test_what_fails_alike_thrice_is_not_tried_again(self, made, played):
        made.write(settings={"base": -1.0}, rows={name: {} for name in "abcde"}, seeds=[0])
        told = []
        with pytest.raises(RunsFailed, match="3 of 5 runs failed .a-0, b-0, c-0."):
            self.share(made, made.load().runs(made.folder / "scratch"), told.append)
        assert "made: 3 runs failed alike; those after c-0 are not tried" in told
        assert played == ["a-0", "b-0", "c-0"]

    @pytest.mark.parametrize(
        ("number", "name"), [(9, r"signal 9 \(Killed, perhaps for want of memory\)"), (15, r"signal 15 \(Terminated\)")]
    )
    def test_a_run_that_is_killed_says_by_what(self, made, monkeypatch, number, name):
        def run(arguments, stdout, **options):
            print("epoch 36: accuracy 97.49", file=stdout)
            return subprocess.CompletedProcess(arguments, -number)

        monkeypatch.setattr(running.subprocess, "run", run)
        with pytest.raises(RunsFailed, match=f"dense-0: killed by {name}; the same command goes on from its last"):
            self.share(made, made.load().runs(made.folder / "scratch")[:1])

    def test_figures_that_are_not_finite_end_no_study(self, made, monkeypatch):
        def run(arguments, **options):
            made.add(json.loads(arguments[-1])["run"], {"score": None, "links": 3.0})
            return subprocess.CompletedProcess(arguments, 0)

        monkeypatch.setattr(running.subprocess, "run", run)
        told = []
        assert len(self.share(made, made.load().runs(made.folder / "scratch")[:2], told.append)) == 2
        assert "made dense-0: score not finite, links 3; 0 s" in told

    @pytest.mark.parametrize("which", ["results", "scratch"])
    def test_a_folder_that_cannot_be_written_is_named_before_anything_runs(self, made, played, which):
        folders = {"results": made.results, "scratch": made.folder / "scratch"}
        runs = made.load().runs(folders["scratch"])
        folders[which] = made.path  # a file
        with pytest.raises(OSError, match=r"the folder of .*made.yaml cannot be written to: .* Name another place"):
            run_all(made.path, made.load(), runs, folders["results"], folders["scratch"], "", quiet)
        assert not played

    def test_a_run_that_the_study_has_no_more(self, made, monkeypatch):
        order = {"path": str(made.path), "quick": False, "run": "gone-0", "scratch": str(made.folder)}
        monkeypatch.setattr(sys, "argv", ["", json.dumps(order | {"target": "nowhere", "command": ""})])
        with pytest.raises(SystemExit, match="has no run gone-0 any more: it was changed after the command began"):
            running.main()

    def test_a_run_begun_with_other_settings_is_refused(self, made):
        study = made.load()
        run = next(run for run in study.runs(made.folder) if run.name == "chts-1")
        run_one(study, run, "")
        changed = replace(run, settings={**run.settings, "epochs": 7})
        with pytest.raises(ValueError, match=r"chts-1 was begun with other settings \(epochs \d+, now 7\): remove it"):
            run_one(study, changed, "")
        (run.folder / "settings.json").write_text("{")
        with pytest.raises(
            ValueError, match=r"settings.json cannot be used: .* Remove its folder to begin the run anew"
        ):
            run_one(study, run, "")

    def test_what_a_killed_command_has_left_running_is_left_to_it(self, made, monkeypatch):
        runs = made.load().runs(made.folder / "scratch")[:1]
        runs[0].folder.mkdir(parents=True)
        order = {"path": str(made.path), "quick": False, "run": runs[0].name, "scratch": str(made.folder / "scratch")}
        monkeypatch.setattr(sys, "argv", ["", json.dumps(order | {"target": "nowhere", "command": ""})])
        with filelock.FileLock(runs[0].folder / "training.lock"), pytest.raises(SystemExit) as ended:
            running.main()
        told = []
        busy = subprocess.CompletedProcess([], ended.value.code)
        monkeypatch.setattr(running.subprocess, "run", lambda *_, **__: busy)
        assert self.share(made, runs, told.append) == []
        assert any(line.startswith("made dense-0: another process is at it, see ") for line in told)
        assert runs[0].folder.exists()

    def test_what_a_killed_command_has_left_running_clears_up(self, made, monkeypatch):
        run = made.load().runs(made.folder / "scratch")[0]
        run.folder.mkdir(parents=True)
        target = made.results / "dense-0.json"
        order = {"path": str(made.path), "quick": False, "run": run.name, "scratch": str(made.folder / "scratch")}
        monkeypatch.setattr(sys, "argv", ["", json.dumps(order | {"target": str(target), "command": ""})])
        running.main()
        assert json.loads(target.read_text(encoding="utf-8"))["figures"]["loss"] == 1.0
        assert not run.folder.exists()

    def test_two_share_the_runs(self, made, played):
        runs = made.load().runs(made.folder / "scratch")
        threads = [threading.Thread(target=self.share, args=(made, part)) for part in (runs, runs[::-1])]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(played) == sorted(run.name for run in runs)
        assert len(list(made.results.glob("*.json"))) == len(runs)

    def test_a_run_that_another_process_is_at_is_left_to_it(self, made, played):
        runs = made.load().runs(made.folder / "scratch")[:2]
        runs[0].folder.mkdir(parents=True)
        told = []
        with filelock.FileLock(runs[0].folder / "lock"):
            assert self.share(made, runs, told.append) == [made.results / "set-0.json"]
        assert any(line.startswith("made dense-0: another process is at it, see ") for line in told)
        assert runs[0].folder.exists()


class TestCommand:
    def call(self, *words):
        main(["study", *map(str, words)])

    def test_a_file_in_place_of_the_results_is_named(self, made):
        with pytest.raises(
            SystemExit, match="the folder of results .*made.yaml cannot be written to: .* another place"
        ):
            main(["study", str(made.path), "--results", str(made.path), "--page"])

    def test_a_folder_in_place_of_a_result_is_named_before_anything_runs(self, made):
        (made.results / "set-0.json").mkdir()
        study = made.load()
        with pytest.raises(ValueError, match="set-0.json is a folder, and a run's result is to be there: remove it"):
            missing(study, study.runs(made.folder), made.results)

    def test_the_peak_of_memory_is_not_that_of_the_parent(self):
        child = "from hf_chts.studies.memory import peak_mib; print(peak_mib())"
        parent = (
            f"import subprocess, sys; b'a' * (1 << 29); subprocess.run([sys.executable, '-c', {child!r}], check=True)"
        )
        peak = subprocess.run(
            [sys.executable, "-c", parent], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        if sys.platform == "linux":
            assert 0 < float(peak) < 400  # of the 512 MiB that the parent has held

    def test_the_page_alone(self, made, capsys):
        made.add("chts-0", {"score": 60.0, "loss": 1.0}, {"epoch": [1, 2], "score": [1.0, 2.0]})
        self.call(made.path, "--page")
        assert "| CHTs" in (made.results / "made.md").read_text(encoding="utf-8")
        assert (made.results / "made.png").is_file()
        assert str(made.results / "made.md") in capsys.readouterr().out

    @pytest.mark.slow
    def test_sigterm_ends_the_run_with_the_command(self, tmp_path):
        words = [ROOT / "studies/classification.yaml", "--quick", "--scratch", tmp_path, "--row", "chts"]
        folder = tmp_path / "classification-quick"
        with subprocess.Popen([sys.executable, "-m", "hf_chts", "study", *map(str, words)], cwd=ROOT) as command:
            deadline = time.monotonic() + 60
            while not (folder / "chts-0" / "training.lock").exists():
                assert time.monotonic() < deadline
                time.sleep(0.05)
            command.terminate()
        assert command.returncode == 143
        with filelock.FileLock(folder / "chts-0" / "training.lock", timeout=30):  # nobody is at it
            assert not (folder / "results" / "chts-0.json").exists()

    @pytest.mark.slow
    def test_a_short_form_from_the_yaml_to_the_page(self, tmp_path):
        words = [ROOT / "studies/classification.yaml", "--quick", "--scratch", tmp_path, "--row", "chts"]
        self.call(*words)
        folder = tmp_path / "classification-quick" / "results"
        text = (folder / "classification-quick.md").read_text(encoding="utf-8")
        assert "(short form)" in text
        assert "1 of 1" in text
        assert (folder / "classification-quick.png").is_file()
        before = (folder / "chts-0.json").read_bytes()
        self.call(*words)  # nothing is missing
        assert (folder / "chts-0.json").read_bytes() == before


def test_a_study_of_the_project_goes_by_its_bare_name_alone(tmp_path, monkeypatch):
    from hf_chts.config_file import STUDIES, find_study

    monkeypatch.chdir(tmp_path)
    assert find_study("classification") == find_study("classification.yaml") == STUDIES / "classification.yaml"
    for name in ("mine/classification.yaml", "mine/classification", "classifications"):
        with pytest.raises(FileNotFoundError, match=rf"there is no study {name}: name a YAML file or .*classification"):
            find_study(name)
    (tmp_path / "classification.yaml").write_text("")
    assert find_study("classification.yaml").resolve() == (tmp_path / "classification.yaml").resolve()
